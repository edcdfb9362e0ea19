"""How is a run asked to stop? By a signal to any rank, a file in its folder, or its time running out; all ranks stop at
one step.

Left out: signals while loading, and a second one (`signals.py`).
"""

from __future__ import annotations

import signal
import time
from datetime import datetime
from pathlib import Path

from rich.console import Console

from megatron_powerflow.checkpoint.folder import STOP_NAME, latest_checkpoint
from megatron_powerflow.config import RunSection
from megatron_powerflow.errors import Interrupted, RequeueRequested
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.owner import Owner
from megatron_powerflow.parallel.pulse import LOADING, Pulse
from megatron_powerflow.parallel.slurm_job import read_job_end
from megatron_powerflow.parallel.together import highest, on_main
from megatron_powerflow.signals import Signals
from megatron_powerflow.time_limit import TimeLimit, seconds_until_stop

GO_ON, REQUEUE, INTERRUPT = range(3)


def time_limit_of(section: RunSection, pulse: Pulse, *, started: float) -> TimeLimit:
    """Return when the run must have stopped: run.stop_before, or the end of its SLURM job if that is sooner.

    started: when the process began, by time.time(), as the limit is.
    """
    ends: list[tuple[float, str]] = []
    if section.stop_before is not None:
        text = str(section.stop_before)
        seconds = seconds_until_stop(text, datetime.fromtimestamp(started).astimezone())
        assert seconds is not None, "config.py has read it"
        ends.append((started + seconds, f"run.stop_before={text}"))
    if (job_end := read_job_end()) is not None:
        ends.append((job_end, "this SLURM job"))
    end, why = min(ends) if ends else (None, "")
    return TimeLimit(end, why, loading_seconds=pulse.seconds.get(LOADING, 0.0))


class StopSignal:
    """Asked at the end of each step: SIGTERM, SIGUSR1, SIGINT, a file RUN/stop, on any rank, or the limit of time.

    All ranks agree, so all of them save the same step. limit: the main rank's, None elsewhere.
    """

    def __init__(
        self,
        folder: Path,
        owner: Owner,
        groups: Groups,
        signals: Signals,
        pulse: Pulse,
        limit: TimeLimit | None,
        console: Console,
    ) -> None:
        self._folder, self._owner, self._groups = folder, owner, groups
        self._signals, self._pulse, self._limit, self._console = signals, pulse, limit, console
        self._asked, self._by = GO_ON, ""  # by: what asked, as far as this rank knows
        self._looked = time.monotonic()

    def requested(self, save_seconds: float | None) -> bool:
        """Tell whether the run is to save now and end: the same answer on every rank. Collective.

        save_seconds: that the last checkpoint took to be on the disk, None before the first. Raises UserError when the
        folder has another owner by now.
        """
        on_main(self._owner.confirm, self._groups)
        asked, self._by = GO_ON, "another rank"
        if self._groups.is_main:
            by_file, by_time = (self._folder / STOP_NAME).exists(), self._is_late(save_seconds)
            if by_file or by_time:
                asked, self._by = REQUEUE, STOP_NAME if by_file else "the limit of time"
        if self._signals.asked is not None:
            asked = INTERRUPT if self._signals.asked == signal.SIGINT else REQUEUE
            self._by = self._signals.asked.name
        self._asked = highest(asked, self._groups)
        return self._asked != GO_ON

    def ending(self, step: int) -> Exception:
        """Return what ends the run on every rank alike, after `requested`. step: steps done, and saved."""
        if self._asked == INTERRUPT:
            return Interrupted(f"interrupted; the same command continues from {latest_checkpoint(self._folder)}")
        return RequeueRequested(f"stopped after step {step}; the same command continues", by=self._by)

    def _is_late(self, save_seconds: float | None) -> bool:
        """Whether the time is running out, by what the steps and saves took so far."""
        now, limit = time.monotonic(), self._limit
        blocked = self._pulse.seconds.pop("checkpoint", 0.0)
        took, self._looked = now - self._looked, now
        if limit is None:
            return False
        limit.note_step(took - blocked)
        if save_seconds is not None:
            limit.note_save(save_seconds)
        if not limit.is_due(time.time()):
            return False
        self._console.print(limit.describe(time.time()))
        return True
