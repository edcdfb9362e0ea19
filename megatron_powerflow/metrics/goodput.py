"""Where did the time of a run go, over all its starts? Arithmetic on the lines of RUN/events.jsonl.

    {"event": "start", "start": ID, "time": T, "uptime": U, "began": s, "untouched": s, "boot": B, "world_size": n, ..}
    {"event": "loaded", ..., "first_step": n, "num_dropped": steps of a lost try that metrics.jsonl held}
    {"event": "step" or "saved", ..., "step": n, "seconds": {phase: s}}
    {"event": "end", ..., "cause": one of CAUSES, "by": what asked, or the class of a bug, "seconds": {phase: s}}

Each line has `start` (which start of the run wrote it), `time` (seconds since 1970) and `uptime` (seconds since the
machine began, which no moved clock changes). `seconds`: of the phases since the line before it. A start without an end
was killed; how long it lived after its last line is told by the time at which the file was last touched, every
BEAT_SECONDS: `untouched`, of the next start's line, is for how long it had not been.

Within a start times are differences of `uptime`. Between two starts they are, where the machine is the same one and has
not been started anew (`boot`), else differences of `time`. Every second between the first start and the last end is in
exactly one of CATEGORIES.

Left out: writing the file (`run_events.py`); the table (`report/goodput_table.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeGuard

from megatron_powerflow.journal import Line

EVENTS_NAME = "events.jsonl"
EVENT_START = b'{"event": "'  # of each line
BEAT_SECONDS = 2.0
CATEGORIES = ("productive", "evaluating", "saving", "loading", "lost", "waiting", "other")
CATEGORY_OF = {
    **dict.fromkeys(("rollout", "reference", "update"), "productive"),
    **dict.fromkeys(("evaluation", "samples"), "evaluating"),
    **dict.fromkeys(("checkpoint", "export"), "saving"),
}
KILLED = "killed"
CAUSES = FINISHED, REQUEUED, REFUSED, INTERRUPTED, BUG = "finished", "requeue", "user error", "interrupted", "bug"
CLOCK_SECONDS = 1.0  # by which two clocks may differ before it is said
LARGEST = 1e11  # seconds; nothing that is a time is larger


@dataclass(frozen=True, slots=True)
class Goodput:
    """Where a run's time went.

    seconds: of each category, by the wall clock; None: not known. process_hours: of each category, processes times
    hours; waiting holds no processes. device: "GPU" or "process". interruptions: cause -> how often. num_steps_done:
    steps whose work counts; num_steps_lost: steps that were done and are done again, or have to be. notes: what was
    noticed, for people.
    """

    seconds: Mapping[str, float | None]
    process_hours: Mapping[str, float | None]
    device: str
    num_starts: int
    interruptions: Mapping[str, int]
    num_steps_done: int
    num_steps_lost: int | None
    running: bool = False
    notes: tuple[str, ...] = ()

    @property
    def wall_seconds(self) -> float | None:
        """Return the time from the first start to the last end; None where a part of it is not known."""
        values = [*self.seconds.values()]
        return None if None in values else math.fsum(value for value in values if value is not None)

    @property
    def effective_share(self) -> float | None:
        """Return the productive share of the wall clock; None where it is not known, or nothing took time."""
        wall, productive = self.wall_seconds, self.seconds["productive"]
        return productive / wall if wall and productive is not None else None


@dataclass(slots=True)
class _Start:
    """One start of the run: its lines, and when they were, in seconds since its process began."""

    lines: list[Line] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    duration: float = 0.0
    cause: str = KILLED
    by: str = ""

    @property
    def ending(self) -> str:
        """What ended it, for people."""
        return f"{self.cause}: {self.by}" if self.by else self.cause

    @property
    def first(self) -> Line:
        return self.lines[0]

    @property
    def began(self) -> float:
        """Seconds before the first line that the process began."""
        return self.first["began"] if self.first["event"] == "start" else 0.0

    @property
    def loaded(self) -> Line | None:
        return next((line for line in self.lines if line["event"] == "loaded"), None)

    @property
    def safe_step(self) -> int:
        """Steps before this one are in a checkpoint, as far as this start knows."""
        steps = [line["step"] for line in self.lines if line["event"] == "saved"]
        return max([self.loaded["first_step"] if self.loaded else 0, *steps])


def wrong_with_event(line: Line) -> str | None:
    """Say what is wrong with a line of events.jsonl; None for nothing. Events of a later version are not wrong."""
    event = line.get("event")
    if not isinstance(event, str) or not isinstance(line.get("start"), str):
        return "names no event and no start"
    needed: tuple[str, ...] = ("time", "uptime", *(("began",) if event == "start" else ()))
    if bad := next((name for name in needed if not _is_time(line.get(name))), None):
        return f"{bad!r} is no number of seconds"
    counts = {"start": "world_size", "loaded": "first_step", "step": "step", "saved": "step"}.get(event)
    if counts and not _is_count(line.get(counts)):
        return f"{counts!r} is no count"
    return None


def goodput_of(events: Sequence[Line], *, last_touched: float | None = None, running: bool = False) -> Goodput:
    """Sum up the lines of events.jsonl, oldest first, which `wrong_with_event` has passed; at least one.

    last_touched: when the file was last touched, seconds since 1970; None: not known. running: whether the last start
    is still going.
    """
    starts = _starts(events)
    notes: list[str] = []
    waiting = _measure(starts, last_touched, running, notes)
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    hours = dict.fromkeys(CATEGORIES, 0.0)
    world_size = 1
    for place, start in enumerate(starts):
        world_size = max(1, start.first["world_size"]) if start.first["event"] == "start" else world_size
        going = running and place == len(starts) - 1
        for category, value in _spent(start, _first_lost_step(starts, place, going), going).items():
            seconds[category] += value
            hours[category] += value * world_size / 3600
    seconds["waiting"] = waiting
    done, lost = _steps(starts, running)
    ends = Counter(start.ending for start in (starts[:-1] if running else starts) if start.cause != FINISHED)
    devices = [line.get("device") for line in events if line["event"] == "start"]
    return Goodput(
        seconds,
        hours,
        "GPU" if devices and all(device == "cuda" for device in devices) else "process",
        len(starts),
        dict(ends),
        done,
        lost,
        running,
        tuple(notes),
    )


def goodput_without_events(metrics: Sequence[Mapping[str, float]], num_starts: int) -> Goodput:
    """Say what the metrics of a run tell, which an older version made: seconds of steps that count, and nothing of what
    was lost. metrics: lines of metrics.jsonl, whose values are numbers."""
    known = dict.fromkeys(("productive", "evaluating", "saving"), 0.0)
    for line in metrics:
        for phase, category in CATEGORY_OF.items():
            value = line.get(f"{phase}_seconds")
            known[category] += value if _is_time(value) else 0.0
    note = "made by a version that kept no events.jsonl: what was lost, loading and waiting cannot be known"
    unknown: dict[str, float | None] = dict.fromkeys(CATEGORIES)
    return Goodput(unknown | known, unknown, "process", num_starts, {}, len(metrics), None, notes=(note,))


def _starts(events: Sequence[Line]) -> list[_Start]:
    by_id: dict[str, _Start] = {}
    for line in events:
        by_id.setdefault(line["start"], _Start()).lines.append(line)
    return [*by_id.values()]


def _measure(starts: Sequence[_Start], last_touched: float | None, running: bool, notes: list[str]) -> float:
    """Fill in when each line was and how long each start took; returns the seconds between the starts."""
    for place, start in enumerate(starts):
        uptime, latest = start.first["uptime"] - start.began, 0.0
        for line in start.lines:
            latest = max(latest, line["uptime"] - uptime)
            start.at.append(latest)
        last = start.lines[-1]
        moved = (last["time"] - start.first["time"]) - (last["uptime"] - start.first["uptime"])
        if abs(moved) > CLOCK_SECONDS:
            notes.append(
                f"the clock was moved by {moved:+.0f} s during start {place + 1}; its times are not by that clock"
            )
        start.duration = latest
        if last["event"] == "end":
            start.cause, start.by = str(last.get("cause", ""))[:80], str(last.get("by", ""))[:80]
        elif place + 1 < len(starts):
            start.duration += _life_after(start, starts[place + 1])
        elif last_touched is not None:
            start.duration += max(0.0, last_touched - last["time"])
    waiting = 0.0
    for place, (before, after) in enumerate(pairwise(starts), start=1):
        gap = _between(before, after) - after.began - (before.duration - before.at[-1])
        if gap < -CLOCK_SECONDS:
            notes.append(
                f"start {place + 1} began before start {place} ended, by the clock; no waiting is counted there"
            )
        waiting += max(0.0, gap)
    if not running and starts[-1].lines[-1]["event"] != "end":
        notes.append(
            "the last start was killed, or still goes on elsewhere; its end is when it last touched events.jsonl"
        )
    return waiting


def _between(start: _Start, after: _Start) -> float:
    """Seconds from the last line of a start to the first one of the next."""
    last, boot = start.lines[-1], start.first.get("boot")
    same_clock = isinstance(boot, str) and boot != "" and boot == after.first.get("boot")
    return after.first["uptime"] - last["uptime"] if same_clock else after.first["time"] - last["time"]


def _life_after(start: _Start, after: _Start) -> float:
    """Seconds that a start lived on after its last line, by what the next one found: 0 where it did not look."""
    if not _is_time(untouched := after.first.get("untouched")):
        return 0.0
    between = _between(start, after)
    return max(0.0, min(between - untouched, between - after.began))


def _first_lost_step(starts: Sequence[_Start], place: int, going: bool) -> float:
    """Steps of this start from this one on were done in vain."""
    later = [loaded["first_step"] for start in starts[place + 1 :] if (loaded := start.loaded)]
    if later:
        return min(later)
    if going or starts[place].cause == FINISHED:
        return math.inf
    return max(start.safe_step for start in starts[place:])


def _spent(start: _Start, first_lost: float, going: bool) -> dict[str, float]:
    """Seconds of each category but waiting; together the start's duration."""
    spent = dict.fromkeys(CATEGORIES, 0.0)
    loaded, before = False, 0.0
    for line, at in zip(start.lines, start.at, strict=True):
        interval, before = at - before, at
        if not loaded:
            spent["loading"] += interval
            loaded = line["event"] == "loaded"
            continue
        ended = line["event"] == "end"
        in_vain = line["step"] >= first_lost if line["event"] == "step" else False
        in_vain = in_vain or (ended and line.get("cause") not in (FINISHED, REQUEUED))
        for category, value in _phases(line, interval).items():
            done = category == "productive" and ended  # of a step that has no line
            spent["lost" if category != "saving" and (in_vain or done) else category] += value
    tail = start.duration - before
    spent["loading" if not loaded else "other" if going else "lost"] += tail
    return spent


def _phases(line: Line, interval: float) -> dict[str, float]:
    """The seconds of the interval before a line, by category; they never come to more than the interval."""
    spent = dict.fromkeys(CATEGORIES, 0.0)
    phases = line.get("seconds")
    if isinstance(phases, dict):
        for phase, value in phases.items():
            spent[CATEGORY_OF.get(phase, "other")] += value if _is_time(value) else 0.0
    total = math.fsum(spent.values())
    if total > interval:
        return {category: value * interval / total for category, value in spent.items()}
    return spent | {"other": spent["other"] + interval - total}


def _steps(starts: Sequence[_Start], running: bool) -> tuple[int, int]:
    """How many steps count, and how many were done in vain: those that metrics.jsonl or the events held when a start
    cut the metrics back, for a kill may fall between the line there and the event, and between the cut and its event;
    and those that the last start leaves to be done again."""
    held: list[int] = []  # what metrics.jsonl holds
    lost = 0
    for start in starts:
        if loaded := start.loaded:
            kept = [step for step in held if step < loaded["first_step"]]
            dropped = loaded.get("num_dropped")
            lost += max(dropped if _is_count(dropped) else 0, len(held) - len(kept))
            held = kept
        held += [line["step"] for line in start.lines if line["event"] == "step"]
    resumes_at = _first_lost_step(starts, _last_loaded(starts), running)
    kept = [step for step in held if step < resumes_at]
    return len(set(kept)), lost + len(held) - len(kept)


def _last_loaded(starts: Sequence[_Start]) -> int:
    return max((place for place, start in enumerate(starts) if start.loaded), default=0)


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LARGEST


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53
