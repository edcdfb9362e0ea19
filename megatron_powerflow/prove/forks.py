"""`python -m megatron_powerflow.prove.forks FOLDER`: how do the ranks of a proof start, and how do they all end?

This process imports torch and Megatron once, and forks the ranks of each part, which share that memory and start in no
time. It starts no thread and makes no tensor, so that a fork finds nothing half done. When a rank fails or stands still
it ends the others and says why in FOLDER/failure.json. It ends when the command that started it is gone, and the ranks
end with it.

Left out: what a rank does (`rank.py`).
"""

from __future__ import annotations

import gc
import json
import os
import secrets
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_powerflow.children import end_with_parent, leave
from megatron_powerflow.errors import EXIT_FAILED, UserError
from megatron_powerflow.parallel.launch import Launch, meet_here
from megatron_powerflow.prove.job import Job, Part, read_job
from megatron_powerflow.whole_files import write_file

FAILURE_NAME = "failure.json"
LOOK_SECONDS = 0.02
CAUSE_SECONDS = 0.2  # in which a rank that was killed is found, after one that failed for want of it
SHOWN_LINES = 12  # of a traceback
PORTS = range(20_000, 32_000)  # below those that the kernel gives to outgoing connections


@dataclass(frozen=True, slots=True)
class Failure:
    """The rank that failed first, and what it was about. words: lines for people; the last of a traceback."""

    part: str
    rank: int
    phase: str
    words: tuple[str, ...]


def main(arguments: Sequence[str]) -> int:
    """Make every part of the proof in the folder that is named; 0, or EXIT_FAILED with FOLDER/failure.json."""
    job, parent = read_job(Path(arguments[0])), os.getppid()
    import_all(job)
    return make(job, tuple(Part), parent)


def import_all(job: Job) -> None:
    """Import what the ranks need, also what torch and transformers import when they are first used.

    On CPUs, whatever this machine has (`launch.cpu_environment`). What is here does not change any more, so the garbage
    collector is not to touch it: the ranks then share its memory.
    """
    print("imports torch and Megatron-Core", flush=True)
    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    import torch
    import torch._dynamo  # by the first optimizer

    import megatron_powerflow.prove.rank  # noqa: F401
    from megatron_powerflow.data.tokenizer import load_tokenizer

    load_tokenizer(job.folder / "model")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def make(job: Job, parts: Sequence[Part], parent: int) -> int:
    """Make parts of a proof, one after the other; 0, or EXIT_FAILED with FOLDER/failure.json."""
    for part in parts:
        if failure := run(part, job, parent):
            (job.folder / FAILURE_NAME).write_text(json.dumps(asdict(failure)), encoding="utf-8")
            return EXIT_FAILED
    return 0


def read_failure(folder: Path) -> Failure | None:
    """Read what `main` left; None where it left nothing."""
    path = folder / FAILURE_NAME
    if not path.is_file():
        return None
    return _to_failure(json.loads(path.read_text(encoding="utf-8")))


def run(part: Part, job: Job, parent: int) -> Failure | None:
    """Make a part in processes of its own, and wait for them. Returns why they failed; None where they did not.

    parent: the process that waits for this one; the ranks end when it is gone.
    """
    job.seen(part).mkdir(parents=True)
    meet_here(_free_port())
    pids = {_start(rank, part, job): rank for rank in range(job.processes(part))}
    failure = None
    try:
        while pids and failure is None:
            time.sleep(LOOK_SECONDS)
            if failed := _take_ended(pids):
                time.sleep(CAUSE_SECONDS)
                failure = _cause(failed | _take_ended(pids), part, job)
            else:
                failure = _standing(part, job)
            if os.getppid() != parent:
                leave(EXIT_FAILED)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)
    return failure


def _start(rank: int, part: Part, job: Job) -> int:
    """Fork a rank and return its process id; in the rank it does not return."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        _be(rank, part, job)
    return pid


def _be(rank: int, part: Part, job: Job) -> NoReturn:
    """Be a rank, to the end of its process. Its stderr, where libraries complain as well, is a file."""
    end_with_parent(os.getppid())
    seen = job.seen(part)
    descriptor = os.open(_errors(seen, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, sys.stderr.fileno())
    code = EXIT_FAILED
    try:
        from megatron_powerflow.prove.rank import run_part

        def note(phase: str) -> None:
            _phase(seen, rank).write_text(phase, encoding="utf-8")
            if rank == 0:
                print(f"{part.value}: {phase}", flush=True)

        size = job.processes(part)
        run_part(part, job, Launch("torchrun", rank, size, rank, size), note)
        code = 0
    except UserError as error:
        _say(_failure(part, job, rank, error.violations), seen)
    except BaseException as error:
        lines = "".join(traceback.format_exception(error)).splitlines()
        _say(_failure(part, job, rank, lines[-SHOWN_LINES:]), seen)
    finally:
        leave(code)


def _say(failure: Failure, seen: Path) -> None:
    """Write why a rank fails, and when, by the clock that all of them share; the others fail after it has left."""
    values = {"at": time.monotonic(), "failure": asdict(failure)}
    write_file(_said(seen, failure.rank), json.dumps(values))


def _take_ended(pids: dict[int, int]) -> dict[int, int]:
    """Take out of `pids` what has ended, and return the exit codes of the ranks among them that failed."""
    failed = {}
    for pid, rank in list(pids.items()):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            del pids[pid]
            if status:
                failed[rank] = os.waitstatus_to_exitcode(status)
    return failed


def _cause(failed: Mapping[int, int], part: Part, job: Job) -> Failure:
    """Return why ranks failed: one without a word was killed, which ends the others; else the first that said why."""
    seen = job.seen(part)
    if silent := [rank for rank in failed if not _said(seen, rank).is_file()]:
        path = _errors(seen, silent[0])
        written = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        words = (f"ended with {failed[silent[0]]}", *written.splitlines()[-SHOWN_LINES:])
        return _failure(part, job, silent[0], words)
    paths = [path for rank in range(job.processes(part)) if (path := _said(seen, rank)).is_file()]
    said = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return _to_failure(min(said, key=lambda values: values["at"])["failure"])


def _failure(part: Part, job: Job, rank: int, words: Sequence[str]) -> Failure:
    """Return the failure of a rank, in the phase that it noted last."""
    phase = _phase(job.seen(part), rank)
    return Failure(part.value, rank, phase.read_text(encoding="utf-8") if phase.is_file() else "starts", tuple(words))


def _to_failure(values: Mapping[str, Any]) -> Failure:
    return Failure(**{**values, "words": tuple(values["words"])})


def _standing(part: Part, job: Job) -> Failure | None:
    """Return the rank that holds the others up, where none has gone on for `job.patience` seconds: the one whose phase
    began first."""
    began = {
        rank: path.stat().st_mtime
        for rank in range(job.processes(part))
        if (path := _phase(job.seen(part), rank)).is_file()
    }
    if not began or time.time() - max(began.values()) < job.patience:
        return None
    return _failure(part, job, min(began, key=began.__getitem__), (f"stood still for {job.patience:g} s",))


def _phase(seen: Path, rank: int) -> Path:
    return seen / f"rank_{rank:03d}.phase"


def _said(seen: Path, rank: int) -> Path:
    return seen / f"rank_{rank:03d}.failure.json"


def _errors(seen: Path, rank: int) -> Path:
    return seen / f"rank_{rank:03d}.stderr"


def _free_port() -> int:
    while True:
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
