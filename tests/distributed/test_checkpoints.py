"""Checkpoints while training goes on: what is on the disk is what was to be saved, and nothing else is taken for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_powerflow.checkpoint.digests import read_sums
from megatron_powerflow.checkpoint.state import read_proof
from tests.conftest import REPOSITORY
from tests.distributed.megatron_sessions import run_training
from tests.distributed.slow_disk import run_with_slow_disk
from tests.distributed.test_resume import assert_same_run, comparable
from tests.gloo_workers import RankFailed


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [5 + i, 6, 7]}) + "\n" for i in range(7)))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}}}
precision: {{dtype: fp32}}
prompts: {{path: {prompts}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
objective: {{alpha: 2, log_z: mlp}}
optimizer: {{lr: 1e-3}}
checkpoint: {{interval: 1}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 1}}
run: {{num_steps: 4, output_dir: {tmp_path / "run"}}}
"""
    )
    return path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "layout", [pytest.param("parallel.tp=2", marks=pytest.mark.slow), "optimizer.distributed=true"]
)
def test_a_copy_that_is_written_later_is_what_was_to_be_saved(gloo, config, tmp_path, layout):
    """Under tp 2 and dp 2: each file of each checkpoint, while the weights move on, and the run itself."""
    at_once, later = tmp_path / "at_once", tmp_path / "later"
    gloo.run(2, run_training, config, f"run.output_dir={at_once}", layout, "checkpoint.asynchronous=false")
    gloo.run(2, run_with_slow_disk, 0.5, config, f"run.output_dir={later}", layout)
    assert names(later) == names(at_once) == ["latest", *(f"step_00000{step}" for step in (1, 2, 3, 4))]
    proofs = set()
    for step in (1, 2, 3, 4):
        ours, theirs = (run / "checkpoints" / f"step_00000{step}" for run in (later, at_once))
        assert read_proof(ours) == read_proof(theirs)
        proofs.add(read_proof(ours))
        for name, digest in read_sums(theirs).items():
            if name.endswith((".distcp", ".safetensors")):
                assert read_sums(ours)[name] == digest, f"step {step}: {name}"
    assert len(proofs) == 4  # the weights did move
    assert sorted(proof.optimizer_step for proof in proofs) == [1, 2, 3, 4]
    assert_same_run(later, at_once)
    # both ranks wrote about as much, whichever way the state is split or shared
    sizes = [path.stat().st_size for path in (later / "checkpoints" / "step_000004" / "policy").glob("__*.distcp")]
    assert len(sizes) == 2
    assert max(sizes) < 1.6 * min(sizes)


def test_what_is_saved_at_tp2_goes_on_at_pp2_and_dp2(gloo, config, tmp_path):
    """The next step, from one checkpoint: losses within 1e-5. What was loaded is compared with what was saved by its
    sums, in each layout."""
    settings = ("objective.log_z=group", "run.export=false")
    saved = tmp_path / "saved"
    gloo.run(2, run_training, config, f"run.output_dir={saved}", "run.num_steps=2", "parallel.tp=2", *settings)
    lines = {}
    for layout in ("parallel.tp=2", "parallel.pp=2", "parallel.tp=1"):
        run = shutil.copytree(saved, tmp_path / layout)
        gloo.run(2, run_training, config, f"run.output_dir={run}", "run.num_steps=3", layout, *settings)
        lines[layout] = comparable(run)[2]
    for layout in ("parallel.pp=2", "parallel.tp=1"):
        for name in ("loss", "grad_norm", "residual_mean", "policy_entropy"):
            assert lines[layout][name] == pytest.approx(lines["parallel.tp=2"][name], rel=1e-5, abs=1e-5), name


def without_quick_look(function, *arguments):
    """On this rank, with large files only: what is wrong is found by digests when training starts."""
    from megatron_powerflow.checkpoint import choice

    before, choice.SMALL_BYTES = choice.SMALL_BYTES, 0
    try:
        return function(*arguments)
    finally:
        choice.SMALL_BYTES = before


def take_each(run: Path, damages: list[tuple[str, str]]) -> list[tuple[str, str, list[str]]]:
    """(file, damage, what is taken and what is said) for each, on this rank; the run is put back each time."""
    from megatron_powerflow.checkpoint.choice import choose
    from megatron_powerflow.checkpoint.whole import whole_checkpoint
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import Layout

    found = []
    newest = run / "checkpoints" / "step_000004"
    aside = newest.with_name("step_000004.damaged")
    with initialized(Layout(1, 1, None, 1, 1, 1, False), read_launch(), seed=0) as groups:
        for name, damage in damages:
            path = newest / name
            content = path.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            path.write_bytes({"cut": content[:middle], "zeroed": bytes(len(content)), "flipped": flipped}[damage])
            choice = choose(run)
            said = list(choice.notices)
            taken = whole_checkpoint(choice.checkpoint, groups, may_go_back=True, say=said.append)
            found.append((name, damage, [taken.name, *said]))
            if aside.exists():
                aside.rename(newest)
            path.write_bytes(content)
    return found


def test_whatever_file_of_the_newest_checkpoint_is_damaged_the_one_before_is_taken(gloo, config, tmp_path):
    """Cut, zeroed, or one bit flipped; then a whole run with one such file ends as if nothing had been."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    gloo.run(1, run_training, config)
    shutil.copytree(run, whole)
    files = [*read_sums(run / "checkpoints" / "step_000004"), "SHA256SUMS"]
    assert len(files) >= 10
    damages = [(name, damage) for name in files for damage in ("cut", "zeroed", "flipped")]
    (quick,) = gloo.run(1, take_each, run, damages)
    (deep,) = gloo.run(1, without_quick_look, take_each, run, damages)
    assert len(quick) == len(deep) == len(damages)
    for name, damage, (taken, *said) in (*quick, *deep):
        assert taken == "step_000003", (name, damage)
        assert "step_000004" in " ".join(said), (name, damage)
        assert name in " ".join(said) or name == "SHA256SUMS", (name, damage)
    shard = max((run / "checkpoints" / "step_000004" / "policy").glob("*.distcp"), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])
    shutil.rmtree(run / "hf_export")
    (printed,) = gloo.run(1, without_quick_look, run_training, config)
    printed = " ".join(printed.split())
    assert f"step_000004 is damaged (policy/{shard.name} is damaged); it stays as step_000004.damaged" in printed
    assert "the run continues from step_000003" in printed
    assert_same_run(run, whole)
    assert {"step_000004", "step_000004.damaged"} <= {*names(run)}


def test_a_run_that_diverges_keeps_its_good_checkpoints(gloo, config, tmp_path):
    """A learning rate of 1e30 after two good steps; with a small one it goes on from there, by the command that the
    message gives."""
    run = tmp_path / "run"
    gloo.run(1, run_training, config, "run.num_steps=2", "run.export=false", "checkpoint.keep=1")
    assert names(run) == ["latest", "step_000002"]
    wild = ("run.num_steps=9", "optimizer.lr=1e30", "optimizer.max_skipped_steps=3", "checkpoint.keep=1")
    with pytest.raises(RankFailed) as caught:
        gloo.run(1, run_training, config, *wild)
    assert caught.value.kind == "UserError"
    command = re.search(r"takes an earlier one\): powerflow train (.*?)\. What the last", caught.value.violations[0])[1]
    assert (run / "checkpoints" / "latest").read_text() == "step_000002\n"
    assert {"step_000002", "step_000003"} <= {*names(run)}
    (kept, *overrides) = shlex.split(command)
    assert overrides == ["optimizer.lr=1e-06"]
    (printed,) = gloo.run(1, run_training, Path(kept), *overrides, "run.num_steps=4", "run.export=false")
    assert "continuing after step 2" in printed
    assert (run / "checkpoints" / "latest").read_text() == "step_000004\n"
    launches = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    assert {"key": "optimizer.lr", "before": 0.001, "now": 1e30} in launches[1]["changed"]
    assert {"key": "optimizer.lr", "before": 1e30, "now": 1e-6} in launches[2]["changed"]
    assert launches[2]["first_step"] == 2


def test_a_finished_run_that_was_killed_before_its_old_checkpoints_went_removes_them(gloo, config, tmp_path):
    """As a kill leaves it: `latest` is the last step's, and the older ones have their names still."""
    run = tmp_path / "run"
    gloo.run(1, run_training, config, "run.num_steps=2", "run.export=false", "checkpoint.keep=null")
    assert names(run) == ["latest", "step_000001", "step_000002"]
    gloo.run(1, run_training, config, "run.num_steps=2", "run.export=false", "checkpoint.keep=1")
    assert names(run) == ["latest", "step_000002"]


def test_a_disk_that_is_full_while_training_goes_on_ends_the_run_at_the_next_step(gloo, config, tmp_path):
    with pytest.raises(RankFailed) as caught:
        gloo.run(2, run_with_slow_disk, 0.1, config, "parallel.tp=2", "run.num_steps=40", full_at="step_000002")
    assert caught.value.kind == "UserError"
    assert "step_000002: the checkpoint could not be written" in caught.value.violations[0]
    assert "No space left on device" in caught.value.violations[0]
    assert names(tmp_path / "run") == ["latest", "step_000001"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_000001\n"
    assert len(comparable(tmp_path / "run")) < 10


def test_state_that_is_not_what_was_saved_is_refused(gloo, config, tmp_path):
    """A checkpoint whose files are as its digests say, and whose proof is of other weights."""
    gloo.run(1, run_training, config, "run.num_steps=1", "run.export=false")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    progress = json.loads((checkpoint / "progress.json").read_text())
    progress["proof"] |= {"moments": "0" * 16, "optimizer_step": 7}
    (checkpoint / "progress.json").write_text(json.dumps(progress))
    sums = (checkpoint / "SHA256SUMS").read_text().splitlines()
    digest = hashlib.sha256((checkpoint / "progress.json").read_bytes()).hexdigest()
    lines = [f"{digest}  progress.json" if line.endswith("  progress.json") else line for line in sums]
    (checkpoint / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    with pytest.raises(RankFailed) as caught:
        gloo.run(1, run_training, config)
    assert "what was loaded is not what was saved: Adam's moments" in caught.value.violations[0]
    assert "Adam's step (1, saved 7)" in caught.value.violations[0]


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_loses_nothing_and_leaves_no_process(gloo, config, tmp_path):
    """SIGKILL to one of two ranks, in mid-save; torchrun ends the other. Whatever they started is gone with them."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = ("parallel.tp=2", "run.num_steps=6")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launcher, "tests.distributed.slow_disk", "3", "train", str(config), f"run.output_dir={run}", *settings]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PART_OF": str(run)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 400
    try:
        while not (run / "checkpoints" / "step_000002.partial").is_dir():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        killed = next(pid for pid, environment in parts_of(run).items() if environment.get("RANK") == "1")
        os.kill(killed, signal.SIGKILL)
        process.wait(timeout=120)
        until = time.monotonic() + 30
        while (left := parts_of(run)) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left
    finally:
        for pid in parts_of(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert (run / "checkpoints" / "latest").read_text() == "step_000001\n"
    (run / "run.lock").unlink(missing_ok=True)
    gloo.run(2, run_training, config, f"run.output_dir={run}", *settings)
    gloo.run(2, run_training, config, f"run.output_dir={whole}", *settings)
    assert_same_run(run, whole)
    assert not [name for name in names(run) if "partial" in name]


def parts_of(run: Path) -> dict[int, dict[str, str]]:
    """Environments of the processes that a start of this run has left, by their ids: whatever sessions they made."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").split("\0")
            environment = dict(line.split("=", 1) for line in lines if "=" in line)
            if environment.get("PART_OF") == str(run):
                found[int(path.parent.name)] = environment
    return found
