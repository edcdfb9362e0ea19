"""How does the command start the processes of a proof, hear of them, and leave none behind?

They are a process group of their own: Ctrl-C reaches the command alone, which ends them all.

Left out: the processes themselves (`forks.py`). No torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_powerflow.parallel.launch import cpu_environment
from megatron_powerflow.prove.forks import SHOWN_LINES, Failure, read_failure

COMMAND = (sys.executable, "-m", "megatron_powerflow.prove.forks")


def run_processes(folder: Path, say: Callable[[str], None], command: Sequence[str] = COMMAND) -> Failure | None:
    """Make the proof that a folder describes. Returns why its processes failed; None where they did not.

    say: is told each phase as it begins. command: to which the folder is added; for tests, which plant a fault first.
    """
    errors = folder / "stderr"
    with errors.open("wb") as file, _ended_by_sigterm():
        process = subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=file,
            env=cpu_environment() | {"TMPDIR": str(folder)},  # of what libraries leave there
            start_new_session=True,
            text=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                say(line.rstrip("\n"))
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    failure = read_failure(folder)
    if failure is None and code != 0:
        written = errors.read_text(encoding="utf-8", errors="replace").splitlines()
        return Failure("processes", 0, "start", (f"ended with {code}", *written[-SHOWN_LINES:]))
    return failure


@contextlib.contextmanager
def _ended_by_sigterm():
    """Have SIGTERM end this process as an exception does, so that what it has started and written goes with it."""

    def end(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
