"""What is this rank doing, and does it get on? Its phase and step, and signs of life of its main thread.

Getting on is a new phase, a pass through the model, or a main thread that is found elsewhere in the program than a
moment ago. In phases that read and write files (SLOW_PHASES), a rank gets on as well while its main thread or a child
of its process computes or moves bytes.

Left out: what others make of it (`verdict.py`), and how they hear of it (`watch.py`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

LOADING = "loading"
SLOW_PHASES = frozenset({LOADING, "checkpoint", "export"})
BETWEEN = "the step"  # between two phases
MOVED_BYTES = 2**24  # read or written: more than the watch itself reads
COMPUTED_SECONDS = 0.2
# Files whose functions wait for other ranks: a main thread in one of them is not the one that is waited for.
WAITING_FILES = ("torch/distributed/distributed_c10d.py", "pipeline_parallel/p2p_communication.py")
WAITING_DEPTH = 8  # frames, innermost first


class Pulse:
    """What this rank does. Written by the main thread, read by another."""

    def __init__(self) -> None:
        self.phase = LOADING
        self.step: int | None = None  # that is being made, from 0
        self.seconds: dict[str, float] = {}  # of the last one of each phase
        self._count = 0
        self._seen: Any = None
        self._seen_work = (0.0, 0)
        self._began = self._moved = time.monotonic()
        self._main = threading.main_thread().ident

    def beat(self) -> None:
        """Note that the work gets on."""
        self._count += 1

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Name what goes on in the block. Where it raises, the phase stays: it is the one that failed."""
        before, self.phase, began = self.phase, phase, time.monotonic()
        self.beat()
        yield
        self.phase = before
        self.seconds[phase] = time.monotonic() - began
        self.beat()

    def begin_steps(self) -> None:
        """End the phase of loading."""
        self.phase, self.seconds[LOADING] = BETWEEN, time.monotonic() - self._began

    def follow(self, *modules: Any) -> None:
        """Take each forward pass of these torch modules for a sign of life."""
        for module in modules:
            module.register_forward_pre_hook(lambda *_: self.beat())

    def idle_seconds(self) -> float:
        """Return for how long nothing has got on. For one reader, which asks every few seconds."""
        now, frames = time.monotonic(), self.frames()
        seen = (self.phase, self.step, self._count, tuple((frame.f_code, frame.f_lasti) for frame in frames))
        work = self._work() if self.phase in SLOW_PHASES else self._seen_work
        computed, moved = (
            abs(work[0] - self._seen_work[0]),
            abs(work[1] - self._seen_work[1]),
        )  # less: a child has ended
        if seen != self._seen or computed > COMPUTED_SECONDS or moved > MOVED_BYTES:
            self._seen, self._seen_work, self._moved = seen, work, now
        return now - self._moved

    def frames(self) -> list[FrameType]:
        """Return the main thread's stack, innermost first."""
        frame = sys._current_frames().get(self._main or 0)
        frames = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        return frames

    def _work(self) -> tuple[float, int]:
        """CPU seconds of the main thread and of the children, which write checkpoints; bytes that all of them moved. 0
        where the kernel does not say."""
        computed, moved = 0.0, 0
        with contextlib.suppress(OSError):
            computed = time.clock_gettime(time.pthread_getcpuclockid(self._main or 0))
        for process in ["self", *_children()]:
            with contextlib.suppress(OSError, ValueError, IndexError):
                lines = Path(f"/proc/{process}/io").read_text(encoding="ascii").splitlines()
                moved += sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))
                if process != "self":
                    fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
                    computed += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return computed, moved

    def is_waiting(self) -> bool:
        """Whether the main thread waits for other ranks, as far as its stack says."""
        return any(frame.f_code.co_filename.endswith(WAITING_FILES) for frame in self.frames()[:WAITING_DEPTH])

    def describe(self) -> str:
        """Write where this rank is. Example: update of step 7."""
        return place(self.phase, self.step)


def _children() -> list[str]:
    """The numbers of the processes that this one has started and that have not ended."""
    found: list[str] = []
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found += path.read_text(encoding="ascii").split()
    return found


def place(phase: str, step: int | None) -> str:
    """Write a phase and a step, which counts from 0, for people, who count from 1."""
    if phase == LOADING or step is None:
        return phase
    return phase if phase == "export" else f"{phase} of step {step + 1}"
