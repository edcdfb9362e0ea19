"""How do ranks hear of each other's failure? Each writes a small file every few seconds and reads some of the others'.

    RUN/heartbeats/LAUNCH/rank_3.json     what rank 3 does; written again at each beat
    RUN/heartbeats/LAUNCH/rank_3.stack    its Python stack, once it has not got on for too long
    RUN/heartbeats/LAUNCH/failure.json    why the run ends: made once, by whoever is first, and only that one prints

A shared file system is what all ranks have, under torchrun and srun alike; a store would end with the process that
holds it. LAUNCH is drawn by the main rank at each start, so that no older start's files are taken for this one's.
A rank that is stuck inside of C with Python's lock held cannot run this thread: faulthandler's own writes its stack.

Left out: who is to blame (`verdict.py`); how the process then ends (`run_end.py`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from megatron_powerflow.parallel.owner import Holder, has_ended, is_seen_from_here, this_process
from megatron_powerflow.parallel.pulse import Pulse
from megatron_powerflow.parallel.verdict import (
    State,
    is_idle,
    late_ranks,
    limit_seconds,
    say_gone,
    say_late,
    say_silent,
    watched_by,
)

HEARTBEATS_NAME = "heartbeats"
FAILURE_NAME = "failure.json"
MOST_BEAT_SECONDS, LEAST_BEAT_SECONDS = 5.0, 0.5
BEATS_IN_HANG = 20
STACK_LINES = 40  # of a late rank, on the screen
WHOLE = "all threads\n"  # behind a dump that its rank has written to the end: another rank reads it meanwhile
OWN_LINES = ("/parallel/", "torch/", "megatron/core/")  # files that say little of where a rank is


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a run ends on all ranks. rank: that said so; step: steps done; text: for people, printed once."""

    rank: int
    exit_code: int
    step: int | None
    text: str


class Watch:
    """The beat of this rank, and its look at the others. A context.

    failed: called in another thread, once, with the failure that another rank has claimed, or this one has for others.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        pulse: Pulse,
        *,
        hang_seconds: float,
        failed: Callable[[Failure], object],
    ) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._pulse, self._hang_seconds, self._failed = pulse, hang_seconds, failed
        self._beat_seconds = min(MOST_BEAT_SECONDS, max(LEAST_BEAT_SECONDS, hang_seconds / BEATS_IN_HANG))
        self._me = this_process("rank")
        self._number = 0
        self._heard: dict[int, tuple[int, float]] = {}  # rank -> (number of its last beat, when it was read)
        self._known: dict[int, tuple[State, Holder]] = {}
        self._stack: IO[str] | None = None
        self._stack_written = False
        self._closing = threading.Event()

    def __enter__(self) -> Watch:
        self._began = self._looked = time.monotonic()
        self._write_beat(0.0)
        with contextlib.suppress(OSError):  # without its file system this rank goes silent, and is named
            self._stack = (self.folder / f"rank_{self.rank}.stack").open("w")
        self._write_stack_if_stuck()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self._closing.set()
        faulthandler.cancel_dump_traceback_later()
        if kind is None or self.failure() is None:
            self._write_beat(0.0, ended=kind is None)

    def claim(self, failure: Failure) -> Failure:
        """Return the failure for which the run ends: this one, unless another rank has been first."""
        return (
            failure if _create(self.folder / FAILURE_NAME, json.dumps(asdict(failure))) else self.failure() or failure
        )

    def failure(self) -> Failure | None:
        """Return the failure that some rank has claimed."""
        values = _read(self.folder / FAILURE_NAME)
        with contextlib.suppress(TypeError):
            return Failure(**values) if values is not None else None
        return None

    def wait_for_another(self, seconds: float) -> Failure | None:
        """Return the failure of another rank, if one is found in this time: claimed, or that it is gone."""
        deadline = time.monotonic() + seconds
        while True:
            if found := self.failure() or self._gone(range(self.world_size)):
                return found
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)

    def _run(self) -> None:
        found = None
        while found is None and not self._closing.wait(self._beat_seconds):
            with contextlib.suppress(OSError):  # a server that is away for a while
                found = self._look()
        if found is not None and not self._closing.is_set():
            self._failed(found)

    def _look(self) -> Failure | None:
        """One beat: write, read, judge."""
        now = time.monotonic()
        if now - self._looked > 4 * self._beat_seconds:  # this process itself was stopped: all seem silent to it
            self._heard.clear()
            self._began = now
        self._looked = now
        idle = self._pulse.idle_seconds()
        self._write_stack_if_stuck()
        self._write_beat(idle)
        if not self.folder.is_dir():  # the main rank has taken back a start that was refused before its first step
            return Failure(0, 2, None, "")
        others = watched_by(self.rank, self.world_size)
        return self.failure() or self._gone(others) or self._silent(others) or self._late(idle)

    def _write_stack_if_stuck(self) -> None:
        """Unless this is called again in time."""
        if self._stack is not None:
            seconds = max(1.0, limit_seconds(self._pulse.phase, self._hang_seconds))
            faulthandler.dump_traceback_later(seconds, file=self._stack)

    def _gone(self, ranks) -> Failure | None:
        for rank in ranks:
            self._read_beat(rank)
            state, holder = self._known.get(rank, (None, None))
            if state and holder and rank != self.rank and not state.ended and has_ended(holder):
                self._read_beat(rank)  # what it wrote last
                if self._known[rank][0].ended:
                    continue
                if failure := self.failure():  # it said so itself before it left
                    return failure
                return self.claim(self._failure(say_gone(self._known[rank][0])))
        return None

    def _silent(self, ranks) -> Failure | None:
        now = time.monotonic()
        for rank in ranks:
            state, holder = self._known.get(rank, (None, None))
            seconds = now - self._heard.get(rank, (0, self._began))[1]
            if seconds <= self._hang_seconds or (state and state.ended):
                continue
            if state is None or holder is None:
                return self.claim(self._failure(f"rank {rank} has not been heard of at all for {seconds:.0f} s"))
            stopped = is_seen_from_here(holder) and _is_stopped(holder.pid)
            failure = self.claim(self._failure(say_silent(state, seconds, stopped=stopped)))
            self._kill(rank)
            return failure
        return None

    def _late(self, idle: float) -> Failure | None:
        mine = self._state(idle)
        if not is_idle(mine, self._hang_seconds):
            return None
        if self._stack is not None and not self._stack_written:
            self._stack_written = True
            faulthandler.dump_traceback(file=self._stack)
            with contextlib.suppress(OSError):
                os.write(self._stack.fileno(), WHOLE.encode())
        for rank in range(self.world_size):
            self._read_beat(rank)
        states = {rank: state for rank, (state, _) in self._known.items()} | {self.rank: mine}
        late = late_ranks(states, self.world_size, self._hang_seconds)
        if not late:
            return None
        stacks = [self._stack_of(state) for state in late[:1]]
        return self.claim(self._failure("\n".join([say_late(late, self.world_size), *filter(None, stacks)])))

    def _failure(self, text: str) -> Failure:
        return Failure(self.rank, 1, self._pulse.step, text)

    def _stack_of(self, state: State) -> str:
        path = self.folder / f"rank_{state.rank}.stack"
        deadline = time.monotonic() + 2 * self._beat_seconds
        text = ""
        while WHOLE not in text and time.monotonic() < deadline:  # it writes at its own beat; in C it ends without
            with contextlib.suppress(OSError):
                text = path.read_text(encoding="utf-8", errors="replace")
            time.sleep(0.1)
        lines = _main_thread(text)
        return "\n".join([f"the stack of rank {state.rank} (all its threads: {path}):", *lines]) if lines else ""

    def _kill(self, rank: int) -> None:
        """A stopped process of this host would outlive the run: it heeds SIGKILL only."""
        holder = self._known[rank][1]
        if is_seen_from_here(holder) and not has_ended(holder):
            with contextlib.suppress(OSError):
                os.kill(holder.pid, signal.SIGKILL)

    def _state(self, idle: float) -> State:
        pulse = self._pulse
        return State(
            self.rank, self._me.host, self._me.pid, pulse.phase, pulse.step, idle, pulse.is_waiting(), _where(pulse)
        )

    def _write_beat(self, idle: float, *, ended: bool = False) -> None:
        self._number += 1
        state = replace(self._state(idle), ended=ended)
        values = {"number": self._number, "state": asdict(state), "process": asdict(self._me)}
        path = self.folder / f"rank_{self.rank}.json"
        partial = path.with_suffix(f".{threading.get_ident()}")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps(values), encoding="utf-8")
            partial.replace(path)

    def _read_beat(self, rank: int) -> None:
        values = _read(self.folder / f"rank_{rank}.json")
        with contextlib.suppress(TypeError, KeyError):
            if values is not None:
                number = values["number"]
                self._known[rank] = State(**values["state"]), Holder(**values["process"])
                if self._heard.get(rank, (None, 0.0))[0] != number:
                    self._heard[rank] = number, time.monotonic()


def _create(path: Path, text: str) -> bool:
    """Make a file whole, once: False where another rank has made it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_text(text, encoding="utf-8")
        try:
            os.link(partial, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            if path.exists():
                return False
            partial.replace(path)
    except OSError:
        return True  # nobody will see it, and so nobody else says it for us
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return True


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _is_stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def _where(pulse: Pulse) -> str:
    """The innermost line of the main thread that is neither a library's nor a collective's."""
    frames = pulse.frames()
    own = [frame for frame in frames if not any(part in frame.f_code.co_filename for part in OWN_LINES)]
    frame = next(iter(own or frames), None)
    if frame is None:
        return "no Python code"
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}"


def _main_thread(text: str) -> list[str]:
    """The lines of the first whole dump that are the main thread's, which faulthandler writes last."""
    blocks = text.partition(WHOLE)[0].split("\n\n")
    main = next((block for block in blocks if "megatron_powerflow" in block and "run_steps" in block), blocks[-1])
    return [line for line in main.splitlines() if line.strip()][:STACK_LINES]
