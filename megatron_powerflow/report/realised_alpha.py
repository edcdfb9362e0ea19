"""Which alpha was asked for, and which came? A line per trained arm, over the last steps of metrics.jsonl.

Left out: how the realised alpha is estimated (`metrics/realised_alpha.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_powerflow.report.arms import Arm
from megatron_powerflow.report.runs import Run
from megatron_powerflow.report.seeds import estimate
from megatron_powerflow.report.tables import Cell, Row, Table

NAME = "alpha_realised"
LAST_STEPS = 10  # those that run.stop_at_alpha goes by
COLUMNS = ("asked", "realised", "R²", "λ realised", "over")


def alpha_table(arms: Sequence[Arm]) -> Table | None:
    """Return a row for each trained arm that has an estimate of the realised alpha; None where no run has one.

    Example of a row: asked 4, realised 2.70 [2.58, 2.82], R² 0.941, λ −1.05, steps 490–499. With several seeds it
    reads 2.70 ± 0.05, a standard error in place of the interval.
    """
    rows = [
        Row(arm_index, True, (), (Cell(arm.config("objective.alpha") or "–", "objective.alpha"), *_measured(arm)))
        for arm_index, arm in enumerate(arms)
        if any(_last_steps(run) for run in arm.members)
    ]
    return Table(COLUMNS, tuple(rows)) if rows else None


def _measured(arm: Arm) -> tuple[Cell, ...]:
    seeds = [run for run in arm.members if _last_steps(run)]
    steps = sorted(step for run in seeds for step in _last_steps(run))
    return (
        _with_error(seeds, NAME, 2),
        _with_error(seeds, f"{NAME}_r2", 3),
        _with_error(seeds, "lambda_realised", 3),
        Cell(f"steps {steps[0]}–{steps[-1]}"),
    )


def _with_error(seeds: Sequence[Run], name: str, decimals: int) -> Cell:
    """Average over the last steps of each seed, then over the seeds. One seed shows its interval, where it has one."""
    means = [mean for run in seeds if (mean := _mean(run, name)) is not None]
    over_seeds = estimate(means)
    if over_seeds is None:
        return Cell("–", "not measured")
    text = f"{over_seeds.mean:.{decimals}f}"
    if over_seeds.se is not None:
        return Cell(f"{text} ± {over_seeds.se:.{decimals}f}", f"standard error over {over_seeds.num_seeds} seeds")
    low, high = (_mean(seeds[0], f"{name}_{side}") for side in ("low", "high"))
    if low is None or high is None:
        return Cell(text, "one seed")
    hint = "one seed: the 95 % interval that a step's prompts give, averaged over the steps"
    return Cell(f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]", hint)


def _mean(run: Run, name: str) -> float | None:
    series: Mapping[int, float] = run.metrics.get(name, {})
    values = [series[step] for step in _last_steps(run) if step in series]
    return float(np.mean(values)) if values else None


def _last_steps(run: Run) -> list[int]:
    """Return those of the run's last ten steps that have an estimate."""
    last = max((max(series) for series in run.metrics.values() if series), default=0)
    return [step for step in sorted(run.metrics.get(NAME, {})) if step > last - LAST_STEPS]
