"""Which rank holds the pre-flight up? Arithmetic over when each rank was last heard of, and the words for it.

    missing    it has not come
    silent     it has come, and its thread no longer writes: stopped or killed, or its node is away
    late       it writes, and is in an earlier stage than the others, for too long

No clock is read here, and no store (`roll_call.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_powerflow.errors import EXIT_FAILED, EXIT_REQUEUE
from megatron_powerflow.preflight.findings import NAMED, names
from megatron_powerflow.preflight.reports import Verdict

SILENT_SECONDS = 15.0
BROKEN_SECONDS = 20.0  # more than SILENT_SECONDS: what broke a rank may be that another one is gone


@dataclass(slots=True)
class Heard:
    """What was heard of a rank, and when: seconds of the judge's clock. count: of its beats; stage: number and name.

    broken: what it failed with, at stage_at.
    """

    count: int
    stage: int
    what: str
    broken: str
    beat_at: float
    stage_at: float


def note(heard: dict[int, Heard], rank: int, beat: Mapping, now: float) -> None:
    """Take in what a rank has written last: {"count", "stage", "what", "broken"}."""
    old = heard.get(rank)
    is_new_beat = old is None or old.count != beat["count"]
    is_new_stage = old is None or (old.stage, old.broken) != (beat["stage"], beat["broken"])
    heard[rank] = Heard(
        **beat,
        beat_at=now if is_new_beat or old is None else old.beat_at,
        stage_at=now if is_new_stage or old is None else old.stage_at,
    )


def not_come(missing: Sequence[int], nodes: Mapping[int, str], world_size: int, seconds: float) -> Verdict:
    """Return the verdict over ranks that have not come. nodes: of ranks, as far as they are known."""
    some = ", ".join(map(str, missing[:NAMED])) + (", ..." if len(missing) > NAMED else "")
    places = tuple(dict.fromkeys(nodes[rank] for rank in missing if rank in nodes))
    where = f" on {', '.join(places)}" if places else ""
    line = (
        f"rank{'s' * (len(missing) > 1)} {some}{where} of {world_size} did not come within {seconds:.0f} s: look at "
        "the file systems of that node (Python and its packages are read there), and that it reaches rank 0's address"
    )
    return Verdict(EXIT_REQUEUE, (line,), places)


def judge(heard: Mapping[int, Heard], nodes: Sequence[str], now: float, limit_seconds: float) -> Verdict | None:
    """Return the verdict over ranks that have come; None while all get on.

    nodes: of each rank. limit_seconds: for which a rank may be in one stage.
    """
    silent = sorted(rank for rank, item in heard.items() if now - item.beat_at > SILENT_SECONDS)
    if silent:
        what = heard[silent[0]].what
        seconds = now - heard[silent[0]].beat_at
        line = f"{names(silent, nodes)}: not heard of for {seconds:.0f} s, last in {what}: "
        return Verdict(EXIT_REQUEUE, (line + "stopped, killed, or its node is away",), _places(silent, nodes))
    broken = sorted(rank for rank, item in heard.items() if item.broken and now - item.stage_at > BROKEN_SECONDS)
    if broken:  # and nobody is silent: it is no rank's end that broke it
        lines = [f"{names([rank], nodes)}, in {heard[rank].what}: {heard[rank].broken}" for rank in broken[:NAMED]]
        return Verdict(EXIT_FAILED, tuple(lines))
    if all(now - item.stage_at <= limit_seconds for item in heard.values()):
        return None
    first = min(item.stage for item in heard.values())
    late = sorted(rank for rank, item in heard.items() if item.stage == first)
    if now - max(heard[rank].stage_at for rank in late) <= limit_seconds:
        return None  # those that the others wait for have begun their stage later
    seconds = now - heard[late[0]].stage_at
    rest = "a node of these or the link between them fails" if len(late) > 1 else "its node or its device fails"
    line = f"{names(late, nodes)}: in {heard[late[0]].what} for {seconds:.0f} s: {rest}"
    few = len(late) < len(heard)
    return Verdict(EXIT_REQUEUE, (line,), _places(late, nodes) if few else ())


def _places(ranks: Sequence[int], nodes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(nodes[rank] for rank in ranks))
