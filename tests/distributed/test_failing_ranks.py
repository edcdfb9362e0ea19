"""One rank fails, the others do not wait for it: real runs of two processes of which one is stopped, killed, or raises.

No launcher looks after them here, so what ends them is the run itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from megatron_powerflow.outcome import read_outcome
from tests.conftest import REPOSITORY
from tests.free_ports import free_port

pytestmark = pytest.mark.slow
HANG_SECONDS = 20
# The command line in which rank 1 meets what WHAT says, at the third step.
PLANTED = """
import os, sys
from megatron_powerflow import cli
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.initialize import prepare_imports

prepare_imports()
import megatron_powerflow.train as training

run_step = training.run_step

def planted(plan, session, prompts, step, **options):
    if step == 2 and session.groups.rank == 1:
        {what}
    return run_step(plan, session, prompts, step, **options)

training.run_step = planted
cli.main()
"""


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
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 100000, output_dir: {tmp_path / "run"}, hang_seconds: {HANG_SECONDS}}}
"""
    )
    return path


class Ranks:
    """`powerflow train` on two processes, each with an output file of its own."""

    def __init__(self, folder: Path, config: Path, *overrides: str, script: Path | None = None) -> None:
        self.run = folder / "run"
        port = str(free_port())
        program = [str(script)] if script else ["-m", "megatron_powerflow.cli"]
        self.files = [folder / f"rank_{rank}.log" for rank in range(2)]
        self.processes = []
        for rank, path in enumerate(self.files):
            places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with path.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, *program, "train", str(config), *overrides],
                    cwd=REPOSITORY,
                    env={**os.environ, "PYTHONPATH": str(REPOSITORY), **places},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.processes.append(process)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.files)

    def wait_for_steps(self, count: int, seconds: float = 900) -> None:
        deadline = time.monotonic() + seconds
        metrics = self.run / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_bytes().splitlines()) < count:
            assert time.monotonic() < deadline, self.said
            assert self.processes[0].poll() is None, self.said
            time.sleep(0.1)

    def wait_for_a_checkpoint(self, seconds: float = 900) -> None:
        deadline = time.monotonic() + seconds
        while not (self.run / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline, self.said
            assert self.processes[0].poll() is None, self.said
            time.sleep(0.1)

    def exit_codes(self, seconds: float) -> list[int]:
        """Of both, once they have ended; nothing that they started is left then."""
        deadline = time.monotonic() + seconds
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(timeout=max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                pytest.fail(f"process {process.pid} is still there\n{self.said}")
        return codes

    def leftovers(self) -> list[int]:
        """Processes of the sessions that the ranks began: children that outlived them."""
        sessions = {process.pid for process in self.processes}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (path / "stat").read_bytes().rpartition(b")")[2].split()
                if int(fields[3]) in sessions and fields[0] not in (b"Z", b"X"):
                    found.append(int(path.name))
        return found


@pytest.mark.parametrize("layout", ["parallel.tp=2", pytest.param("parallel.tp=1", marks=pytest.mark.long)])
def test_a_rank_that_is_stopped_is_named_and_the_run_ends(config, tmp_path, layout, record_property):
    with Ranks(tmp_path, config, layout) as ranks:
        ranks.wait_for_steps(2)
        stopped = ranks.processes[1]
        stopped.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        codes = ranks.exit_codes(HANG_SECONDS + 60)
        record_property("seconds", time.monotonic() - began)
        assert codes == [1, -signal.SIGKILL], ranks.said
        said = ranks.said
        assert said.count("has not been heard of for") == 1
        assert f"rank 1 on {socket.gethostname()} (process {stopped.pid}) has not been heard of for" in said
        assert "it is stopped (SIGSTOP), and so it writes no stack" in said
        outcome = read_outcome(ranks.run)
        assert (outcome.outcome, outcome.exit_code) == ("failed", 1)
        assert f"process {stopped.pid}" in outcome.message
        assert wait_until_none_is_left(ranks)


def wait_until_none_is_left(ranks: Ranks, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while ranks.leftovers():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def test_a_rank_that_is_killed_is_named_and_the_same_command_continues(config, tmp_path, record_property):
    """In the midst of things, after a checkpoint."""
    patient = "run.hang_seconds=1000"  # not by that
    with Ranks(tmp_path, config, patient, "checkpoint.interval=1", "checkpoint.keep=2") as ranks:
        ranks.wait_for_a_checkpoint()
        killed = ranks.processes[1]
        killed.kill()
        began = time.monotonic()
        codes = ranks.exit_codes(60)
        record_property("seconds", time.monotonic() - began)
        assert codes == [1, -signal.SIGKILL], ranks.said
        assert ranks.said.count("is gone, last seen in") == 1, ranks.said
        assert f"rank 1 on {socket.gethostname()} (process {killed.pid}) is gone" in ranks.said
        assert "Traceback" not in ranks.said
        assert read_outcome(ranks.run).outcome == "failed"
        assert wait_until_none_is_left(ranks)
    done = int((ranks.run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))
    with Ranks(tmp_path, config, f"run.num_steps={done + 1}", "run.export=false") as ranks:
        assert ranks.exit_codes(900) == [0, 0], ranks.said
        assert f"continuing after step {done}" in ranks.said
        assert read_outcome(ranks.run).outcome == "finished"


def test_under_max_restarts_a_run_whose_rank_was_killed_goes_on_by_itself(config, tmp_path):
    """torchrun starts both again; they meet at a new port, in the folder of the run that was."""
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "megatron_powerflow.cli", "train", str(config), "parallel.tp=2"]
    command += ["run.num_steps=12", "checkpoint.interval=2", "run.export=false"]
    with log.open("wb") as file:
        launcher = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while not (run / "checkpoints" / "latest").exists():
            assert time.monotonic() < deadline, log.read_text()
            assert launcher.poll() is None, log.read_text()
            time.sleep(0.02)
        os.kill(rank_of(launcher.pid, "1"), signal.SIGKILL)
        assert launcher.wait(timeout=600) == 0, log.read_text()
    finally:
        launcher.terminate()
        launcher.wait()
    assert "continuing after step" in log.read_text()
    assert read_outcome(run).outcome == "finished"
    launches = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    assert len(launches) == 2
    assert launches[1]["first_step"] >= 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(12)]


def rank_of(parent: int, rank: str) -> int:
    """The child of `parent` that is so-manyeth of its ranks."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_child = int((path / "stat").read_bytes().rpartition(b")")[2].split()[1]) == parent
            if is_child and f"RANK={rank}".encode() in (path / "environ").read_bytes().split(b"\0"):
                return int(path.name)
    raise AssertionError(f"process {parent} has no rank {rank}")


@pytest.mark.parametrize(
    ("what", "code", "first"),
    [
        ("raise KeyError('planted')", 1, "rank 1 on {host}, in the step of step 3: failed"),
        ("raise UserError('the disk of this node is full; free space')", 2, "error: the disk of this node is full"),
    ],
    ids=["bug", "user_error"],
)
def test_a_rank_that_raises_alone_ends_all_with_its_exit_code_and_is_printed_once(
    config, tmp_path, what, code, first, record_property
):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(what=what))
    with Ranks(tmp_path, config, "parallel.tp=2", "run.hang_seconds=1000", script=script) as ranks:
        ranks.wait_for_steps(2)
        began = time.monotonic()
        assert ranks.exit_codes(90) == [code, code], ranks.said
        record_property("seconds", time.monotonic() - began)
        assert ranks.said.count(first.format(host=socket.gethostname())) == 1, ranks.said
        assert ranks.said.count("Traceback (most recent call last)") == (code == 1)
        assert f"rank 1 on {socket.gethostname()}, in the step of step 3" in ranks.said
        outcome = read_outcome(ranks.run)
        assert outcome.exit_code == code
        assert "planted" in outcome.message or "free space" in outcome.message
        assert wait_until_none_is_left(ranks)


def test_a_rank_that_hangs_is_named_with_the_stack_of_its_own(config, tmp_path, record_property):
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.format(what="import threading; threading.Event().wait()"))
    with Ranks(tmp_path, config, "parallel.tp=2", script=script) as ranks:
        ranks.wait_for_steps(2)
        began = time.monotonic()
        assert ranks.exit_codes(HANG_SECONDS * 2 + 90) == [1, 1], ranks.said
        record_property("seconds", time.monotonic() - began)
        assert ranks.said.count("has not got on for") == 1, ranks.said
        assert f"rank 1 on {socket.gethostname()} (process {ranks.processes[1].pid}) has not got on for" in ranks.said
        assert "in the step of step 3" in ranks.said
        assert "in planted" in ranks.said  # of the stack
        assert wait_until_none_is_left(ranks)


@pytest.mark.parametrize("where", ["initialize_model_parallel", "model_groups"])
def test_a_rank_that_is_killed_while_groups_are_made_ends_the_others(config, tmp_path, where):
    """Each group is connected anew, through the store, which would wait half an hour for the rank that is gone."""
    script = tmp_path / "planted.py"
    script.write_text(
        f"""
import os, signal
from megatron_powerflow import cli
from megatron_powerflow.parallel import initialize

initialize.prepare_imports()
from megatron.core import parallel_state

module = parallel_state if {where!r} == "initialize_model_parallel" else initialize
whole = getattr(module, {where!r})

def planted(*arguments, **options):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments, **options)

setattr(module, {where!r}, planted)
cli.main()
"""
    )
    with Ranks(tmp_path, config, "parallel.tp=2", script=script) as ranks:
        assert ranks.processes[1].wait(timeout=300) == -signal.SIGKILL
        assert ranks.processes[0].wait(timeout=60) == 1
        who = rf"rank 1 on \S+ \(process {ranks.processes[1].pid}\) is gone, before the ranks were connected\n"
        assert re.search(who, ranks.said), ranks.said
        assert "Traceback" not in ranks.said
        assert wait_until_none_is_left(ranks)


def test_ranks_that_do_not_come_are_named(monkeypatch):
    """The first rendezvous waits for minutes, and says for whom."""
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_powerflow.errors import UserError
    from megatron_powerflow.parallel import meeting
    from megatron_powerflow.parallel.owner import this_process

    monkeypatch.setattr(meeting, "MEETING", timedelta(seconds=1))
    store = dist.HashStore()
    store.set("here/2", json.dumps(asdict(this_process("rank"))))
    with (
        pytest.raises(UserError, match="ranks 1, 3 of 4 did not come within 0 minutes of rank 0 on"),
        meeting.meeting(0, 4, store),
    ):
        pass


def test_a_rank_that_is_killed_before_the_ranks_are_connected_ends_the_others(tmp_path):
    """Rank 1 has come, and is gone: its process is over when rank 0 waits for the others, and connects to them."""
    script = tmp_path / "waiting.py"
    script.write_text(
        """
import json, subprocess, sys, time
from dataclasses import asdict, replace
import torch.distributed as dist
from megatron_powerflow.parallel import meeting
from megatron_powerflow.parallel.owner import _process_start, this_process

other = subprocess.Popen(["sleep", "1000"])
there = replace(this_process("rank"), pid=other.pid, process_start=_process_start(other.pid))
store = dist.HashStore()
store.set("here/1", json.dumps(asdict(there)))
with meeting.meeting(0, 2, store):
    other.kill()
    other.wait()
    time.sleep(1000)
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"rank 1 on \S+ \(process \d+\) is gone, before the ranks were connected\n", done.stderr), (
        done.stderr
    )
