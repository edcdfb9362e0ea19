"""Where did the time of these runs go, for people and for programs? `powerflow goodput`, and a line of the report.

Left out: the arithmetic (`metrics/goodput.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_powerflow.console import duration
from megatron_powerflow.errors import UserError
from megatron_powerflow.journal import notes_of, read_journal
from megatron_powerflow.metrics.goodput import (
    CATEGORIES,
    EVENT_START,
    EVENTS_NAME,
    Goodput,
    goodput_of,
    goodput_without_events,
    wrong_with_event,
)
from megatron_powerflow.metrics.provenance import LAUNCHES_NAME
from megatron_powerflow.metrics.writers import FILE_NAME as METRICS_NAME
from megatron_powerflow.metrics.writers import read_metrics
from megatron_powerflow.report.reading import visible

MEANINGS = {
    "productive": "rollouts, reference scores and updates of steps that count",
    "evaluating": "evaluations and samples",
    "saving": "checkpoints and the export",
    "loading": "from the start of the process to the first step",
    "lost": "steps done in vain, and what a start did behind its last line",
    "waiting": "between two starts",
    "other": "the rest",
}


def read_goodput(run: Path, notes: list[str], *, running: bool = False) -> Goodput | None:
    """Read where a run's time went; None where the folder holds no step, start or event. Damaged lines are noted.

    running: whether the run is going on now.
    """
    path = run / EVENTS_NAME
    journal = read_journal(path, wrong_with_event, start=EVENT_START)
    notes += notes_of(path, journal.damages)
    if journal.lines:
        return goodput_of(journal.lines, last_touched=path.stat().st_mtime, running=running)
    launches = read_journal(run / LAUNCHES_NAME).lines
    metrics = read_metrics(run, notes)
    return goodput_without_events(metrics, len(launches)) if launches or metrics else None


def read_all(runs: Mapping[Path, bool], notes: list[str]) -> dict[Path, Goodput]:
    """Read the goodput of each run; the values say which of them are running. Raises UserError for each folder that
    is none."""
    found, violations = {}, []
    for run, running in runs.items():
        goodput = read_goodput(run, notes, running=running) if run.is_dir() else None
        if goodput is None:
            nothing = f"no {EVENTS_NAME}, {METRICS_NAME} or {LAUNCHES_NAME} with a line in it"
            violations.append(f"{run}: {nothing if run.is_dir() else 'no such folder'}; give run folders")
        else:
            found[run] = goodput
    if violations:
        raise UserError(violations)
    return found


def goodput_table(run: Path, goodput: Goodput) -> Table:
    """Make the table of one run: time, share of the wall clock and GPU-hours of each category."""
    hours = f"{goodput.device}-hours"
    table = Table(title=goodput_sentence(visible(run, 200), goodput), title_justify="left")
    table.add_column("")
    for column in ("seconds", "share", hours):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("what")
    wall = goodput.wall_seconds
    for category in CATEGORIES:
        seconds = goodput.seconds[category]
        share = "" if not wall or seconds is None else f"{seconds / wall:.1%}"
        spent = "" if category == "waiting" else _number(goodput.process_hours[category], 3)
        table.add_row(category, _number(seconds, 1), share, spent, MEANINGS[category])
    total = _total(goodput.process_hours)
    whole = "" if not wall else "100.0%"
    table.add_row("wall clock", _number(wall, 1), whole, _number(total, 3), "first start to last end")
    return table


def goodput_sentence(shown: str, goodput: Goodput) -> str:
    """Say in a line where a run's time went. Example: runs/a: 3 starts, 40 steps, effective 91.2 % of 3.1 h; 4 steps
    lost; interrupted by: killed 2."""
    starts = f"{goodput.num_starts} start{'' if goodput.num_starts == 1 else 's'}"
    parts = [f"{shown}: {starts}, {goodput.num_steps_done} steps"]
    wall, share = goodput.wall_seconds, goodput.effective_share
    if wall is not None and share is not None:
        parts[0] += f", effective {share:.1%} of {duration(wall)}"
    if goodput.num_steps_lost is not None:
        parts.append(f"{goodput.num_steps_lost} steps lost")
    if goodput.interruptions:
        ends = sorted(goodput.interruptions.items(), key=lambda item: (-item[1], item[0]))
        parts.append("interrupted by: " + ", ".join(f"{visible(cause, 100)} {count}" for cause, count in ends))
    if goodput.running:
        parts.append("running")
    return "; ".join([*parts, *goodput.notes])


def goodput_json(goodput: Goodput) -> dict[str, Any]:
    """Return the numbers for programs; None stands for what is not known."""
    return {
        "seconds": dict(goodput.seconds),
        "wall_seconds": goodput.wall_seconds,
        "effective_share": goodput.effective_share,
        "process_hours": {name: hours for name, hours in goodput.process_hours.items() if name != "waiting"},
        "effective_share_of_process_hours": _share_of_hours(goodput),
        "processes_are": goodput.device,
        "num_starts": goodput.num_starts,
        "interruptions": dict(goodput.interruptions),
        "num_steps_done": goodput.num_steps_done,
        "num_steps_lost": goodput.num_steps_lost,
        "running": goodput.running,
        "notes": list(goodput.notes),
    }


def goodput_lines(goodputs: Sequence[tuple[str, Goodput | None]]) -> list[str]:
    """Say where the time of each run of a report went; nothing of runs that cannot tell."""
    return [goodput_sentence(shown, goodput) for shown, goodput in goodputs if goodput and goodput.wall_seconds]


def _share_of_hours(goodput: Goodput) -> float | None:
    total, productive = _total(goodput.process_hours), goodput.process_hours["productive"]
    return productive / total if total and productive is not None else None


def _total(hours: Mapping[str, float | None]) -> float | None:
    known = [value for value in hours.values() if value is not None]
    return sum(known) if len(known) == len(hours) else None


def _number(value: float | None, decimals: int) -> str:
    return "not known" if value is None else f"{value:,.{decimals}f}"
