"""Which rank holds the others up? Arithmetic over what all ranks wrote of themselves, and the words for it.

    gone       its process has ended on this host without a word
    silent     it has written nothing for `run.hang_seconds`: stopped, or its host or file system is away
    late       no rank gets on, and this one is not waiting for another

Left out: reading the files, clocks (`watch.py`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_powerflow.parallel.pulse import SLOW_PHASES, place

SLOW_FACTOR = 4.0  # times hang_seconds, for phases in which a rank may wait long for files
NAMED = 4  # ranks in a sentence


@dataclass(frozen=True, slots=True)
class State:
    """What a rank wrote of itself. idle_seconds: since it last got on; waiting: for other ranks; where: line of code.

    step: from 0, None before the first. ended: it has left without a failure.
    """

    rank: int
    host: str
    pid: int
    phase: str
    step: int | None
    idle_seconds: float
    waiting: bool
    where: str
    ended: bool = False

    def name(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def watched_by(rank: int, world_size: int) -> list[int]:
    """Return the ranks whose files this one reads at each beat: 1, 2, 4, ... behind it.

    Every rank is watched by some on other nodes, and each reads few files: 9 of 512.
    """
    distances = (2**power for power in range(world_size.bit_length()))
    return sorted({(rank + distance) % world_size for distance in distances if distance < world_size} - {rank})


def limit_seconds(phase: str, hang_seconds: float) -> float:
    """Return for how long a rank may not get on in this phase."""
    return hang_seconds * (SLOW_FACTOR if phase in SLOW_PHASES else 1.0)


def is_idle(state: State, hang_seconds: float) -> bool:
    """Whether a rank has not got on for longer than it may."""
    return state.idle_seconds > limit_seconds(state.phase, hang_seconds)


def late_ranks(states: Mapping[int, State], world_size: int, hang_seconds: float) -> list[State]:
    """Return the ranks that the others wait for; none while any rank gets on, or has said nothing yet.

    Those that do not wait themselves; where all of them wait, those of the earliest step; all of them, perhaps.
    """
    here = [state for state in states.values() if not state.ended]
    if len(states) < world_size or not here or not all(is_idle(state, hang_seconds) for state in here):
        return []
    working = [state for state in here if not state.waiting]
    if working and len(working) < len(here):
        return sorted(working, key=lambda state: -state.idle_seconds)
    earliest = min(_step(state) for state in here)
    behind = [state for state in here if _step(state) == earliest]
    return sorted(behind, key=lambda state: (-state.idle_seconds, state.rank))


def _step(state: State) -> int:
    return -1 if state.step is None else state.step


def say_late(late: list[State], world_size: int) -> str:
    """Say who is late. Example: rank 1 on node3 (process 7) has not got on for 312 s in update of step 7 ..."""
    first = late[0]
    if len(late) == world_size:
        where = "; ".join(f"rank {state.rank} in {state.where}" for state in late[:NAMED])
        return (
            f"no rank has got on for {first.idle_seconds:.0f} s in {place(first.phase, first.step)}, and none is "
            f"behind: {where}"
        )
    names = ", ".join(state.name() for state in late[:NAMED]) + (", ..." if len(late) > NAMED else "")
    return (
        f"{names} {'has' if len(late) == 1 else 'have'} not got on for {first.idle_seconds:.0f} s in "
        f"{place(first.phase, first.step)} ({first.where}), while the other ranks wait"
    )


def say_gone(state: State) -> str:
    """Say that a rank's process has ended without a word."""
    return (
        f"{state.name()} is gone, last seen in {place(state.phase, state.step)}: it was killed (out of memory? "
        "`dmesg` says so) or crashed"
    )


def say_silent(state: State, seconds: float, *, stopped: bool) -> str:
    """Say that nothing was heard of a rank for so long. stopped: the kernel says that it is."""
    why = "it is stopped (SIGSTOP)" if stopped else "it is stopped, or its host or its file system is away"
    return (
        f"{state.name()} has not been heard of for {seconds:.0f} s, last in {place(state.phase, state.step)} "
        f"({state.where}): {why}, and so it writes no stack"
    )
