"""A run that was killed and started again is the run that never was: the same metrics lines, to the last digit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY, run_cli
from tests.distributed.megatron_sessions import run_training

TIMES = ("_seconds", "tokens_per_second", "peak_memory_bytes")


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
optimizer: {{lr: 1e-3, lr_decay: cosine, warmup_steps: 2}}
checkpoint: {{interval: 2}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 2}}
run: {{num_steps: 6, output_dir: {tmp_path / "run"}}}
"""
    )
    return path


def comparable(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


def weights(run: Path) -> dict:
    from safetensors.torch import load_file

    return {
        name: value for file in sorted(run.glob("hf_export/*.safetensors")) for name, value in load_file(file).items()
    }


def start_and_kill_after_step(config: Path, run: Path, step: int, num_processes: int, *settings: str) -> None:
    """Start training, wait until the line of `step` (0-based) is written, and kill every process of it by pid."""
    command = [sys.executable, "-m", "megatron_powerflow.cli"]
    if num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes), "-m"]
        command = [sys.executable, *launcher, "megatron_powerflow.cli"]
    process = subprocess.Popen(
        [*command, "train", str(config), f"run.output_dir={run}", *settings],
        cwd=REPOSITORY,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    try:
        while len((run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []) <= step:
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def as_if_killed_after(whole: Path, crashed: Path, checkpoint: int, lines: int) -> None:
    """What the disk holds when a run dies `lines` steps in: an older checkpoint, later lines, half a line."""
    shutil.copytree(whole, crashed)
    for path in (crashed / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > checkpoint:
            shutil.rmtree(path)
    (crashed / "checkpoints" / "latest").write_text(f"step_{checkpoint:06d}\n")
    (crashed / "checkpoints" / "step_000004.partial").mkdir()
    written = (crashed / "metrics.jsonl").read_text().splitlines()[: lines + 1]
    (crashed / "metrics.jsonl").write_text("\n".join(written)[:-30])
    samples = (crashed / "samples.jsonl").read_text().splitlines()[:2]
    (crashed / "samples.jsonl").write_text("\n".join(samples) + "\n")
    shutil.rmtree(crashed / "hf_export")


CASES = {
    "one_process": (1, ()),
    "tp2_group": (2, ("parallel.tp=2", "objective.log_z=group")),
    "tp2_deterministic": (2, ("parallel.tp=2", "run.deterministic=true")),
    "dp2_distributed": (2, ("optimizer.distributed=true",)),
    "tp2_pp2_scalar": (4, ("parallel.tp=2", "parallel.pp=2", "objective.log_z=scalar")),
    "packed_cp2_distributed": (
        2,
        (
            "parallel.cp=2",
            "parallel.micro_batch_size=null",
            "parallel.max_tokens_per_micro_batch=64",
            "optimizer.distributed=true",
        ),
    ),
    "bf16": (1, ("precision.dtype=bf16",)),
    "bf16_distributed_swap": (2, ("precision.dtype=bf16", "optimizer.distributed=true", "model.reference=swap")),
}


# what the kill storm of CI does with processes and SIGKILL is long here
MARKS = {
    "tp2_group": pytest.mark.long,
    "packed_cp2_distributed": pytest.mark.long,
    "tp2_pp2_scalar": pytest.mark.long,
    "bf16_distributed_swap": pytest.mark.slow,
    "tp2_deterministic": pytest.mark.slow,
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES])
def test_a_crashed_run_continues_as_the_unbroken_one(gloo, config, tmp_path, case):
    num_processes, settings = CASES[case]
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    gloo.run(num_processes, run_training, config, f"run.output_dir={whole}", *settings)
    as_if_killed_after(whole, crashed, checkpoint=2, lines=3)
    (printed, *_) = gloo.run(num_processes, run_training, config, f"run.output_dir={crashed}", *settings)
    assert "continuing after step 2" in printed
    assert len(comparable(whole)) == 6
    assert_same_run(crashed, whole)


@pytest.mark.long
def test_a_killed_run_continues_as_the_unbroken_one(gloo, config, tmp_path):
    """The same with real processes under torchrun and SIGKILL, two pipeline stages."""
    whole, killed, pp2 = tmp_path / "whole", tmp_path / "killed", "parallel.pp=2"
    gloo.run(2, run_training, config, f"run.output_dir={whole}", pp2)
    start_and_kill_after_step(config, killed, 2, 2, pp2)
    assert 3 <= len(comparable(killed)) < 6
    done = run_cli("train", config, f"run.output_dir={killed}", pp2, num_processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_run(killed, whole)


def assert_same_run(left: Path, right: Path) -> None:
    assert comparable(left) == comparable(right)
    left_weights, right_weights = weights(left), weights(right)
    assert left_weights.keys() == right_weights.keys()
    assert all(torch.equal(left_weights[name], right_weights[name]) for name in left_weights)
    assert (left / "samples.jsonl").read_text() == (right / "samples.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, ()), (2, ("parallel.tp=2",))),
        ((2, ("parallel.tp=2",)), (2, ("parallel.pp=2",))),
        ((2, ("parallel.pp=2",)), (1, ())),
        ((2, ("optimizer.distributed=true",)), (3, ("parallel.pp=3", "optimizer.distributed=true"))),
        ((2, ("optimizer.distributed=true",)), (4, ("parallel.pp=2", "optimizer.distributed=true"))),
        ((2, ("parallel.pp=2",)), (2, ("parallel.pp=2", "parallel.vpp=2"))),
    ],
)
def test_a_run_continues_under_another_layout(gloo, config, tmp_path, before, after):
    """The state is the same; sums are ordered differently, so the next lines agree to rounding. With a head: the first
    gradient of its calibrated bias is rounding, and so is the step that it makes of it."""
    moved, reference = tmp_path / "moved", tmp_path / "reference"
    common = ("optimizer.lr_decay=constant",)
    for (num_processes, settings), steps in ((before, 2), (after, 4)):
        overrides = (f"run.output_dir={moved}", f"run.num_steps={steps}", *common, *settings)
        gloo.run(num_processes, run_training, config, *overrides)
    gloo.run(1, run_training, config, f"run.output_dir={reference}", "run.num_steps=4", *common)
    ours, theirs = comparable(moved)[2], comparable(reference)[2]
    assert ours["response_length_mean"] == theirs["response_length_mean"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert ours["log_z_mean"] == pytest.approx(theirs["log_z_mean"], rel=1e-5)
    assert ours["log_z_std"] == pytest.approx(theirs["log_z_std"], rel=1e-3)
    assert theirs["log_z_std"] > 1e-3  # it tells prompts apart


@pytest.mark.slow
def test_a_stop_signal_saves_and_asks_to_be_started_again(gloo, config, tmp_path):
    """SIGUSR1, as SLURM sends it before the limit: exit code 75, and the same command ends as the unbroken run."""
    command = [
        sys.executable,
        "-m",
        "megatron_powerflow.cli",
        "train",
        str(config),
        f"run.output_dir={tmp_path / 'run'}",
    ]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 75, stderr
    assert "the same command continues" in stderr
    num_done = len(comparable(tmp_path / "run"))
    assert num_done < 6
    assert run_cli("train", config, f"run.output_dir={tmp_path / 'run'}").returncode == 0
    launches = [json.loads(line) for line in (tmp_path / "run" / "launches.jsonl").read_text().splitlines()]
    assert [launch["first_step"] for launch in launches] == [0, num_done]
    assert all(f"python -m megatron_powerflow.cli train {config} " in launch["command"] for launch in launches)
    assert all(launch["versions"].keys() >= {"python", "torch", "megatron-core"} for launch in launches)
    gloo.run(1, run_training, config, f"run.output_dir={tmp_path / 'whole'}")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_stop_file_ends_every_rank_at_the_same_step(config, tmp_path):
    run = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*launcher, "megatron_powerflow.cli", "train", str(config), f"run.output_dir={run}", "run.num_steps=500"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (run / "stop").touch()
    _, stderr = process.communicate(timeout=300)
    assert "the same command continues" in stderr
    assert "exitcode  : 75" in stderr
    step = int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    assert len(comparable(run)) == step < 500


def test_old_checkpoints_go_when_asked(gloo, config, tmp_path):
    gloo.run(1, run_training, config, "checkpoint.keep=1", "checkpoint.interval=1", "run.num_steps=3")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step_000003"]
