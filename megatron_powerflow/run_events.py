"""What does a run note of its own time? RUN/events.jsonl: its starts, steps, saves and ends, for `powerflow goodput`.

One line a step and one a save, on the disk when it is written, by the main rank alone. The file is never cut back. What
the lines are, and what is made of them: `metrics/goodput.py`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import Interrupted, RequeueRequested, UserError
from megatron_powerflow.journal import append_lines
from megatron_powerflow.metrics.goodput import (
    BEAT_SECONDS,
    BUG,
    EVENTS_NAME,
    FINISHED,
    INTERRUPTED,
    REFUSED,
    REQUEUED,
)
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.slurm_job import read_job
from megatron_powerflow.parallel.together import gather_to_main, on_main


class RunEvents:
    """The journal of one start, on the main rank. A context: how the start ends is its last line, unless it is killed.

    Methods raise OSError that names the file; leaving does not: everything else is on the disk by then.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / EVENTS_NAME
        self._start = ""  # before `begin`, as on the other ranks, there is nothing to note
        self._finished = False
        self._seconds: dict[str, float] = {}  # of each phase, since the last line
        self._over = threading.Event()

    def __enter__(self) -> RunEvents:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        self._over.set()
        if self._start and (error is not None or self._finished):
            cause, by = (FINISHED, "") if error is None else _cause_of(error)
            with contextlib.suppress(OSError):
                self._write("end", cause=cause, by=by, seconds=self._taken())

    def begin(self, **facts: Any) -> None:
        """Note the start of this process, and for how long the file had not been touched."""
        untouched = None
        if self._path.exists():
            untouched = max(0.0, time.time() - self._path.stat().st_mtime)
        self._start = uuid.uuid4().hex[:12]
        self._write("start", began=process_age(), untouched=untouched, boot=_boot(), pid=os.getpid(), **facts)
        threading.Thread(target=self._beat, name="events", daemon=True).start()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a phase for the next line, also when it fails."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.monotonic() - began

    def loaded(self, *, first_step: int, num_dropped: int) -> None:
        """Note that the first step may begin. num_dropped: steps of a lost try that metrics.jsonl held."""
        self._write("loaded", first_step=first_step, num_dropped=num_dropped)

    def step(self, step: int) -> None:
        """Note that a step has ended."""
        self._write("step", step=step, seconds=self._taken())

    def saved(self, step: int) -> None:
        """Note that a checkpoint of `step` steps is complete."""
        self._write("saved", step=step, seconds=self._taken())

    def finished(self) -> None:
        """The run has come to its end, which the last line will say."""
        self._finished = True

    def _taken(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, {}
        return {phase: round(seconds, 6) for phase, seconds in taken.items()}

    def _write(self, event: str, **values: Any) -> None:
        line = {"event": event, "start": self._start, "time": time.time(), "uptime": uptime()}
        append_lines(self._path, [line | values])

    def _beat(self) -> None:
        """Touch the file, so that it tells how long a start lived that was killed."""
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a server that is away for a while
                os.utime(self._path)


def begin(events: RunEvents, groups: Groups) -> None:
    """Note the start of a run: its processes, their hosts, the SLURM job. Collective."""
    hosts = gather_to_main(socket.gethostname(), groups)
    job = read_job()
    facts = {
        "world_size": groups.world_size,
        "device": groups.device.type,
        "hosts": sorted(set(hosts or ())),
        "job": job.id if job else None,
        "restarts": job.restarts if job else 0,
    }
    on_main(lambda: events.begin(**facts), groups)


def uptime() -> float:
    """Return the seconds since the machine began; only differences on one machine mean anything."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def process_age() -> float:
    """Return for how many seconds this process has existed; 0 where the kernel does not say."""
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rpartition(b")")[2].split()[19])  # the name before it may hold spaces
    except OSError:
        return 0.0
    return max(0.0, uptime() - ticks / os.sysconf("SC_CLK_TCK"))


def _boot() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    return ""


def _cause_of(error: BaseException) -> tuple[str, str]:
    if isinstance(error, RequeueRequested):
        return REQUEUED, error.by
    if isinstance(error, UserError):
        return REFUSED, ""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return INTERRUPTED, ""
    return BUG, type(error).__name__
