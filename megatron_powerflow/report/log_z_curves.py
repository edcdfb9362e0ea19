"""Is log Z' where it should be, and is a repetition trap near? Two pictures, from metrics.jsonl.

log Z' calibrated: it meets the group's estimate, E[w residual] stays at 0, and the residual's quantiles close in on 0.
The trap (where a run measures it, and its estimate is worth something: `metrics/trap.py`): above a margin of 0 a loop
has more mass than the reasoning it replaces.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megatron_powerflow.metrics.alarm import ALARMS
from megatron_powerflow.metrics.axes import step_axis
from megatron_powerflow.metrics.names import METRICS
from megatron_powerflow.report.arms import Arm
from megatron_powerflow.report.pictures import (
    Cast,
    Panel,
    Picture,
    draw_band,
    finish,
    in_style,
    panels,
    scale_to,
    wrapped,
    zero_line,
)
from megatron_powerflow.report.plot_style import LineStyle, MarkKeywords
from megatron_powerflow.report.runs import Run
from megatron_powerflow.report.seeds import Band, band

ALARM: MarkKeywords = {
    "marker": "X",
    "markersize": 13,
    "markerfacecolor": "white",
    "markeredgewidth": 1.8,
    "linestyle": "none",
}
QUANTILES = ("residual_p05", "residual_p25", "residual_p50", "residual_p75", "residual_p95")
# Of a trapped run: loop_nats a token of the loop costs, entry_nats the way into it, both under the base model.
TRAP = ("trap_margin", "trap_lambda", "trap_loop_nats", "trap_entry_nats")


PANELS = (
    Panel("log_z_mean", note="thin: the group's estimate", thin="group_log_z_mean"),
    Panel("weighted_residual_mean", note="0: stationary", around_0=True),
    Panel("trap_margin", note="a loop pays above 0", around_0=True),
    Panel("trap_lambda"),
    Panel("trap_loop_nats"),
    Panel("trap_entry_nats"),
)


def draw_log_z(cast: Cast) -> Picture | None:
    """Draw log Z' and the measures of the repetition trap against step. Returns None when no arm has any of them."""
    shown = [(arm, style) for arm, style in cast.pairs() if any(arm.metric(panel.name) for panel in PANELS)]
    available = [panel for panel in PANELS if any(arm.metric(panel.name) for arm, _ in shown)]
    if not available:
        return None
    alarms = 0
    with in_style():
        figure, axes = panels(len(available))
        for axis, panel in zip(axes, available, strict=True):
            series = [points for arm, _ in shown for points in arm.metric(panel.name)]
            for arm, style in shown:
                draw_band(axis, style, arm.metric(panel.name))
                if panel.thin:
                    draw_band(axis, style, arm.metric(panel.thin), thin=True)
                if panel.name == "trap_margin":
                    alarms += _mark_alarms(axis, arm, style)
            scale = scale_to(axis, series, signed=True)
            if panel.around_0:
                zero_line(axis)
            if panel.name == "trap_margin":
                _shade_above_0(axis)
            axis.set_title(panel.title + scale)
            step_axis(axis)
        extra = [Line2D([], [], **ALARM, color="black", label="a seed's first alarm on its lengths")] if alarms else []
        png = finish(figure, shown, extra)
    absent = [METRICS[name].name for name in TRAP if not any(arm.metric(name) for arm in cast.arms)]
    return Picture(
        name="log_z",
        title="log Z′ and the repetition trap",
        alt=f"log Z' against the group's estimate, and {len(available) - 1} further panels, for {len(shown)} arms",
        caption=(
            "Line: mean over seeds; band: from the lowest to the highest seed. Where log Z′ is the group's estimate "
            "the two lines are one. The dark level line is 0; a weighted mean residual there says that log Z′ is "
            "stationary. The shaded side of the trap margin is where a repetition loop outweighs the reasoning in the "
            "target itself, so that more training makes it worse. No margin: no loop among the rollouts, or too few "
            "effective samples for λ."
        ),
        png=png,
        notes=((f"no run measures the {', the '.join(absent)}",) if absent else ()) + _alarm_notes(cast.arms),
    )


def draw_residual_fan(cast: Cast) -> Picture | None:
    """Draw quantiles of the residual over each step's rollouts, one panel per arm. Returns None without any."""
    shown = [(arm, style) for arm, style in cast.pairs() if _fan(arm)]
    if not shown:
        return None
    with in_style():
        figure, axes = panels(len(shown), columns=3 if len(shown) != 4 else 2, height=3.1)
        for axis, (arm, style) in zip(axes, shown, strict=True):
            low, lower, middle, upper, high = _fan(arm)
            axis.fill_between(low.steps, low.mean, high.mean, color=style.color, alpha=0.22, linewidth=0)
            axis.fill_between(low.steps, lower.mean, upper.mean, color=style.color, alpha=0.45, linewidth=0)
            axis.plot(low.steps, middle.mean, color=style.color, linewidth=2.0)
            zero_line(axis)
            axis.set_title(wrapped(arm.label, 30), fontsize=12.8)
            step_axis(axis)
        png = finish(figure, [])
    return Picture(
        name="residual_fan",
        title="Quantiles of the residual",
        alt=f"Fans of residual quantiles against step, one panel for each of {len(shown)} arms",
        caption=(
            "Over the rollouts of a step: median (line), 25 to 75 % (dark), 5 to 95 % (light), each averaged over "
            "seeds. Every panel has its own scale. At zero loss the fan closes on the level line, 0."
        ),
        png=png,
    )


def _fan(arm: Arm) -> list[Band]:
    """Return a band per quantile, all over the steps that have every quantile; [] where there are none."""
    seeds = []
    for run in arm.members:
        series = [run.metrics.get(name, {}) for name in QUANTILES]
        steps = set(series[0]).intersection(*series[1:])
        if steps:
            seeds.append([{step: points[step] for step in steps} for points in series])
    bands = [band([seed[quantile] for seed in seeds]) for quantile in range(len(QUANTILES))]
    return [quantile_band for quantile_band in bands if quantile_band is not None]


def _mark_alarms(axis: Axes, arm: Arm, style: LineStyle) -> int:
    """Mark the first step of each seed at which the alarm on growing lengths rings. Returns how many were marked."""
    marked = 0
    for run in arm.members:
        first = _first_ring(run, "length")
        if first is not None:
            height = run.metrics.get("trap_margin", {}).get(first)
            if height is not None:
                axis.plot(first, height, **ALARM, color=style.color, zorder=6)
                marked += 1
    return marked


def _alarm_notes(arms: Sequence[Arm]) -> tuple[str, ...]:
    """Name every alarm that rang: those on the loss or on short responses have no mark in a panel."""
    return tuple(
        f"{arm.label}, seed {run.seed}: alarm {name}, first at step {first}"
        for arm in arms
        for run in arm.members
        for name in ALARMS
        if (first := _first_ring(run, name)) is not None
    )


def _first_ring(run: Run, name: str) -> int | None:
    """Return the first step, counted from 0 as on the axes, at which an alarm rang; None where it did not.

    Runs of older versions had one alarm, called `alarm`: that on lengths.
    """
    own = run.metrics.get(f"alarm_{name}")
    if own is None:
        own = run.metrics.get("alarm", {}) if name == "length" else {}
    return min((step for step, value in own.items() if value), default=None)


def _shade_above_0(axis: Axes) -> None:
    low, high = axis.get_ylim()
    axis.axhspan(0.0, max(high, 0.0), color="#8a8a8a", alpha=0.16, linewidth=0, zorder=0.5)
    axis.set_ylim(min(low, 0.0), max(high, 0.0))
