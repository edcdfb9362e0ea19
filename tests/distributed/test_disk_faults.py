"""A disk that is full or read-only, under each file of a run: every rank ends with the path, and nothing is lost.

File systems are mounted for real, which needs root; elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_powerflow.errors import UserError
from tests.distributed.megatron_sessions import run_training

TIMES = ("_seconds", "tokens_per_second", "peak_memory_bytes")
PAGE = 4096  # of a tmpfs
JOURNALS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "events.jsonl", "launches.jsonl")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """An empty file system of its own. Example of options: size=64k."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave not a byte free."""
    done = subprocess.run(["dd", "if=/dev/zero", f"of={folder / 'filler'}", "bs=4k"], capture_output=True, text=True)
    assert "No space left" in done.stderr


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    rows = ({"prompt_token_ids": [5 + i, 6, 7], "answer": "1", "id": str(i)} for i in range(5))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}}}
precision: {{dtype: fp32}}
prompts: {{path: {tmp_path / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6, save: true}}
parallel: {{micro_batch_size: 2}}
objective: {{log_z: group}}
optimizer: {{lr: 1e-3}}
checkpoint: {{interval: 1}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 2, prompts: {tmp_path / "prompts.jsonl"}, num_prompts: 2, num_responses: 2, interval: 1}}
run: {{num_steps: 2, output_dir: {tmp_path / "run"}, export: false}}
"""
    )
    return path


def as_killed_at_a_page_end(path: Path) -> None:
    """Without the answers of step 1, and with spaces before the last line's end up to the end of its page on the disk:
    the next line needs a page of its own."""
    lines = path.read_bytes().splitlines()
    if path.name in ("samples.jsonl", "evaluations.jsonl"):
        lines = [line for line in lines if json.loads(line)["step"] == 0]
    text = b"\n".join(lines)
    path.write_bytes(text + b" " * (-(len(text) + 1) % PAGE) + b"\n")


def what_came(config: Path, *overrides: str) -> tuple[str, ...]:
    """What `powerflow train` says is wrong, on this rank; () where it trained to the end."""
    try:
        run_training(config, *overrides)
    except UserError as error:
        return error.violations
    return ()


def what_came_of_room_that_others_took(config: Path, *overrides: str) -> tuple[str, ...]:
    """The same, where there was room enough when the start looked."""
    from megatron_powerflow.training import resources

    needed_bytes, resources.needed_bytes = resources.needed_bytes, lambda *_: 0
    try:
        return what_came(config, *overrides)
    finally:
        resources.needed_bytes = needed_bytes


def comparable(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().split("\n") if line]
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in lines]


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().split("\n") if line]


def assert_whole(run: Path, unbroken: Path) -> None:
    assert comparable(run) == comparable(unbroken)
    for name in ("samples.jsonl", "evaluations.jsonl"):
        assert steps_of(run / name) == steps_of(unbroken / name)
    for path in sorted((unbroken / "rollouts").iterdir()):
        assert (run / "rollouts" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "names"), [("full", (*JOURNALS, "rollouts")), ("read-only", ("metrics.jsonl", "rollouts"))]
)
def test_a_disk_that_refuses_one_file_of_a_run_ends_every_rank_and_loses_nothing(gloo, config, tmp_path, how, names):
    """After a step, each file in its turn lies on a disk of its own that is full, or read-only, from then on."""
    unbroken, begun, run = tmp_path / "unbroken", tmp_path / "begun", tmp_path / "run"
    gloo.run(2, run_training, config, f"run.output_dir={unbroken}", "parallel.pp=2")
    gloo.run(2, run_training, config, f"run.output_dir={begun}", "parallel.pp=2", "run.num_steps=1")
    for name in names:
        shutil.copytree(begun, run)
        with mounted(tmp_path / f"disk_{name}", "size=256k") as disk:
            shutil.move(run / name, disk / name)
            (run / name).symlink_to(disk / name)
            if name in JOURNALS:
                as_killed_at_a_page_end(disk / name)
            fill(disk) if how == "full" else remount(disk, "ro")
            answers = gloo.run(2, what_came, config, "parallel.pp=2")
            reason = "No space left on device" if how == "full" else "Read-only file system"
            for violations in answers:
                assert len(violations) == 1
                assert name in violations[0]
                assert reason in violations[0]
                assert "free space on that disk" in violations[0]
            assert (run / "checkpoints" / "latest").read_text() == "step_000001\n"
            assert not (run / "run.lock").exists()
            remount(disk, "rw,size=64m")
            assert gloo.run(2, what_came, config, "parallel.pp=2") == [(), ()]
            assert_whole(run, unbroken)
        shutil.rmtree(run)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_moment_loses_nothing(gloo, config, tmp_path):
    """From a disk that holds no byte of a run to one that lacks the last: never a traceback, and the same command ends
    as the unbroken run."""
    unbroken = tmp_path / "unbroken"
    gloo.run(1, run_training, config, f"run.output_dir={unbroken}")
    pages = sum(-(-path.stat().st_size // PAGE) for path in unbroken.rglob("*") if path.is_file())
    named = set()
    for share in (0.0, 0.01, 0.2, 0.5, 0.95):
        with mounted(tmp_path / f"disk_{share}", f"size={4 * max(1, int(pages * share))}k") as disk:
            if share == 0:
                fill(disk)
            run = disk / "run"
            if share < 0.9:
                ((violation,),) = gloo.run(1, what_came, config, f"run.output_dir={run}")
                assert "are free there; set checkpoint.keep" in violation
            ((violation,),) = gloo.run(1, what_came_of_room_that_others_took, config, f"run.output_dir={run}")
            named.add(violation.removeprefix(str(disk)).split(":")[0])
            assert "No space left on device" in violation or "checkpoint could not be written" in violation
            (disk / "filler").unlink(missing_ok=True)
            remount(disk, "size=64m")
            assert gloo.run(1, what_came, config, f"run.output_dir={run}") == [()]
            assert_whole(run, unbroken)
    assert len(named) >= 3, named


def what_came_of_a_disk_that_filled(config: Path, disk: str, moment: str, *overrides: str) -> tuple[str, ...]:
    """The same, of a disk that is full from a moment of the second save on."""
    import torch.distributed as dist

    from megatron_powerflow.checkpoint import saving, shards

    places = {
        "before the save": (saving, "_fresh_folder_with_room", True),
        "before the shards": (shards.HeldWriter, "write", True),
        "before the index": (shards.HeldWriter, "finish", True),
        "behind the index": (shards.HeldWriter, "finish", False),
    }
    owner, name, is_before = places[moment]
    function, calls = getattr(owner, name), []

    def filling(*arguments, **more):
        calls.append(name)
        is_due = len(calls) == 2 and dist.get_rank() == 0
        if is_due and is_before:
            fill(Path(disk))
        result = function(*arguments, **more)
        if is_due and not is_before:
            fill(Path(disk))
        return result

    setattr(owner, name, filling)
    try:
        return what_came(config, *overrides)
    finally:
        setattr(owner, name, function)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before the save", "before the shards", "before the index", "behind the index"])
def test_a_disk_that_fills_up_within_a_save_ends_every_rank(gloo, config, tmp_path, moment):
    """Megatron's main rank writes alone what the others wait for: none of them waits for ever."""
    with mounted(tmp_path / "disk", "size=64m") as disk:
        settings = (
            "parallel.pp=2",
            f"run.output_dir={disk / 'run'}",
            "run.num_steps=3",
            "checkpoint.asynchronous=false",
        )
        answers = gloo.run(2, what_came_of_a_disk_that_filled, config, str(disk), moment, *settings)
        for violations in answers:
            assert len(violations) == 1, answers
            assert "step_000002: the checkpoint could not be written" in violations[0]
        assert (disk / "run" / "checkpoints" / "latest").read_text() == "step_000001\n"
        (disk / "filler").unlink()
        assert gloo.run(2, what_came, config, *settings) == [(), ()]


@pytest.mark.slow
def test_a_folder_that_is_read_only_is_refused_and_a_picture_that_cannot_be_drawn_is_not(gloo, config, tmp_path):
    with mounted(tmp_path / "disk", "size=64m") as disk:
        run = disk / "run"
        gloo.run(2, run_training, config, f"run.output_dir={run}", "parallel.pp=2", "run.num_steps=1")
        (run / "curves.png").mkdir()  # which no picture replaces
        remount(disk, "ro")
        drawn = [f"run.output_dir={run}", "parallel.pp=2", "metrics.curves=true"]
        for violations in gloo.run(2, what_came, config, *drawn):
            assert len(violations) == 1
            assert "Read-only file system" in violations[0]
            assert str(run) in violations[0]
        remount(disk, "rw")
        assert gloo.run(2, what_came, config, *drawn) == [(), ()]
        assert len(comparable(run)) == 2


def test_wandb_that_fails_is_said_once_and_ends_nothing(tmp_path, monkeypatch):
    """A service that is not there: wandb's own process cannot be started."""
    from megatron_powerflow.config import MetricsSection
    from megatron_powerflow.metrics.writers import WandbWriter
    from megatron_powerflow.records import StepMetrics

    wandb = pytest.importorskip("wandb")

    class Broken:
        def log(self, values, step):
            raise OSError(28, "No space left on device")

    said: list[str] = []
    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    section = MetricsSection(wandb="offline")
    writer = WandbWriter(section, tmp_path, {}, "id", say=said.append)
    for step in range(3):
        writer.write(StepMetrics(step, {"loss": 1.0}))
    writer.close()
    assert said == [
        "wandb: OSError: [Errno 28] No space left on device; the run goes on without it, and metrics.jsonl holds every "
        "number"
    ]


def test_tensorboard_says_at_once_that_the_disk_is_full(tmp_path):
    pytest.importorskip("tensorboard")
    from megatron_powerflow.metrics.writers import TensorBoardWriter
    from megatron_powerflow.records import StepMetrics

    with mounted(tmp_path / "disk", "size=64k") as disk:
        writer = TensorBoardWriter(disk, first_step=0)
        fill(disk)
        values = {f"metric_{i}": 1.0 for i in range(300)}  # more than the last page of its file has room for
        with pytest.raises(OSError, match="No space left") as caught:
            writer.write(StepMetrics(0, values))
        assert "events.out.tfevents" in os.fspath(caught.value.filename)
        writer.close()
