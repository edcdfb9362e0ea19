"""When must a run stop to be saved before its time is up? Arithmetic and words; no clock is read here.

    stop when    now + step + save + margin > end

step, save: the longest of the last few, in seconds, because the next one may be as long. Left out: who knows the end
(`parallel/slurm_job.py` for SLURM), and who asks (`training/stop_signal.py`).
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from datetime import datetime

REMEMBERED = 5  # steps and saves
LEAST_MARGIN_SECONDS = 10.0  # for closing files and ending the processes
MARGIN_SHARE = 0.25  # of a step and a save
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?")


def seconds_until_stop(text: str, now: datetime) -> float | None:
    """Return the seconds from `now`, when the run starts, that `run.stop_before` leaves; None for what is no time.

    text: a duration (23h30m, 90m, 5400) or an ISO time (2026-11-27T08:00), in local time where it names no zone.
    """
    match = _DURATION.fullmatch(text)
    if match and any(match.groups()):
        return float(sum(int(part) * unit for part, unit in zip(match.groups(), _UNITS.values(), strict=True) if part))
    try:
        return (datetime.fromisoformat(text).astimezone() - now.astimezone()).total_seconds()
    except (ValueError, OverflowError):
        return None


def longest(seconds: Iterable[float]) -> float:
    """Return the longest, 0 of none."""
    return max(seconds, default=0.0)


def needed_seconds(steps: Iterable[float], saves: Iterable[float]) -> float:
    """Return what one more step, its save and the margin may take."""
    work = longest(steps) + longest(saves)
    return work + max(LEAST_MARGIN_SECONDS, MARGIN_SHARE * work)


class TimeLimit:
    """The end of a run's time, and how long its steps and saves take. All times are of one clock, in seconds.

    end: None for no limit; why: where it comes from, for people. save: before the first save, what loading took: the
    same bytes, the other way.
    """

    def __init__(self, end: float | None, why: str, *, loading_seconds: float = 0.0) -> None:
        self.end, self.why = end, why
        self._steps: deque[float] = deque(maxlen=REMEMBERED)
        self._saves: deque[float] = deque([loading_seconds], maxlen=REMEMBERED)
        self._saved = False

    def note_step(self, seconds: float) -> None:
        """Remember how long a step took, all of it but saving."""
        self._steps.append(seconds)

    def note_save(self, seconds: float) -> None:
        """Remember how long a save took."""
        if not self._saved:
            self._saves.clear()
        self._saved = True
        self._saves.append(seconds)

    def is_due(self, now: float) -> bool:
        """Whether one more step could end too late to be saved."""
        return self.end is not None and now + needed_seconds(self._steps, self._saves) > self.end

    def describe(self, now: float) -> str:
        """Say why the run stops now."""
        assert self.end is not None
        return (
            f"{max(0.0, self.end - now):.0f} s are left of {self.why}, and a step and a save may take "
            f"{needed_seconds(self._steps, self._saves):.0f} s: the run saves and stops"
        )
