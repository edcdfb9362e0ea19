"""Does accuracy rise at a stable length, or does an arm collapse? The two pictures of the paper's Fig. 3.

From evaluations.jsonl, and the KL from metrics.jsonl. Arms that were not evaluated in training are a point or a level
line, from their evaluation.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megatron_powerflow.metrics.axes import end_at_share, step_axis
from megatron_powerflow.metrics.names import METRICS, heading, label
from megatron_powerflow.report.arms import Arm
from megatron_powerflow.report.pictures import GREY, Cast, Picture, draw_band, finish, in_style, panels
from megatron_powerflow.report.plot_style import LineStyle, MarkKeywords
from megatron_powerflow.report.seeds import Band, band, error_lengths

KL = "kl_per_response"  # of metrics.jsonl; the others are of evaluations.jsonl
BY_STEP = ("accuracy", KL, "truncated_fraction", "response_length_mean")
START: MarkKeywords = {
    "marker": "o",
    "markerfacecolor": "white",
    "markersize": 10,
    "markeredgewidth": 1.8,
    "linestyle": "none",
}
END: MarkKeywords = {
    "marker": "*",
    "markersize": 17,
    "markeredgecolor": "white",
    "markeredgewidth": 0.8,
    "linestyle": "none",
}


def draw_accuracy_against_length(cast: Cast) -> Picture | None:
    """Draw each arm's path through (mean length in tokens, accuracy), or a point without in-training evaluations.

    Returns None where no trained arm was evaluated.
    """
    paths = [(arm, style, path) for arm, style in cast.pairs() if (path := _path(arm)) is not None]
    if not paths and not any(arm.trained and arm.point("accuracy") for arm in cast.arms):
        return None
    with in_style():
        figure, (axis,) = panels(1, height=6.0)
        points = [(arm, style) for arm, style in cast.pairs() if _draw_point(axis, arm, style)]
        for _, style, (length, accuracy) in paths:
            errors = error_lengths(accuracy.mean, accuracy.se, share=True)
            axis.errorbar(
                length.mean, accuracy.mean, xerr=length.se, yerr=errors, fmt="none", ecolor=style.color, alpha=0.35
            )
            axis.plot(length.mean, accuracy.mean, **style.marked(), zorder=3)
        for _, style, (length, accuracy) in paths:  # over every line
            axis.plot(length.mean[-1], accuracy.mean[-1], **END, color=style.color, zorder=5)
            axis.plot(length.mean[0], accuracy.mean[0], **START, color=style.color, zorder=6)
        axis.set_xlabel(label("response_length_mean"))
        axis.set_ylabel(label("accuracy"))
        end_at_share(axis)
        extra = [Line2D([], [], **START, color=GREY, label="first evaluation")] if paths else []
        extra += [Line2D([], [], **END, color=GREY, label="last evaluation")] if paths else []
        shown = [*points, *((arm, style) for arm, style, _ in paths)]
        png = finish(figure, [pair for pair in cast.pairs() if pair in shown], extra)
    return Picture(
        name="accuracy_against_length",
        title="Accuracy against length",
        alt=f"Accuracy against mean response length: a path in step order for {len(paths)} arms, a point for "
        f"{len(points)}",
        caption=(
            "Each arm's in-training evaluations in step order, mean over seeds, with one standard error over seeds "
            "in both directions where there is more than one. Up is better; a path that runs off to one side has "
            "lost its length: to the left it answers without reasoning, to the right it repeats itself until it is "
            "cut. A single point: an arm without in-training evaluations, from its evaluation.json."
        ),
        png=png,
    )


def draw_accuracy_by_step(cast: Cast) -> Picture | None:
    """Draw accuracy, and what it may be paid with, against step; arms that were only evaluated are level lines.

    Returns None where no arm was evaluated in training.
    """
    trained = [(arm, style) for arm, style in cast.pairs() if arm.evaluated("accuracy")]
    if not trained:
        return None
    level = [(arm, style) for arm, style in cast.pairs() if not arm.trained and arm.point("accuracy")]
    with in_style():
        available = [name for name in BY_STEP if any(_by_step(arm, name) for arm, _ in trained)]
        figure, axes = panels(len(available), height=3.7)
        for axis, name in zip(axes, available, strict=True):
            for arm, style in trained:
                draw_band(axis, style, _by_step(arm, name))
            for level_index, (arm, style) in enumerate(level):
                _draw_level(axis, arm, style, name, level_index, len(level))
            if METRICS[name].share:
                end_at_share(axis)
            axis.set_title(heading(name))
            step_axis(axis)
        png = finish(figure, trained + level)
    shown = ", ".join(METRICS[name].name for name in available)
    return Picture(
        name="accuracy_by_step",
        title="Accuracy, KL, truncated share and length against step",
        alt=f"Against step: {shown}; {len(trained)} arms, {len(level)} more as level lines",
        caption=(
            "In-training evaluations; the KL to the base model is that of the training rollouts. Line: mean over "
            "seeds; band: from the lowest to the highest seed. Level lines: arms that were evaluated and not trained, "
            "whose questions may be others than those of the in-training evaluations (see the table of evaluations)."
        ),
        png=png,
    )


def _by_step(arm: Arm, name: str) -> Sequence[Mapping[int, float]]:
    return arm.metric(name) if name == KL else arm.evaluated(name)


def _path(arm: Arm) -> tuple[Band, Band] | None:
    """Return the bands of length and of accuracy at the steps that have both, or None."""
    both = [
        [e for e in run.evaluations if "accuracy" in e.values and "response_length_mean" in e.values]
        for run in arm.members
    ]
    length, accuracy = (
        band([{e.step: e.values[name] for e in evaluations} for evaluations in both], max_points=10**9)
        for name in ("response_length_mean", "accuracy")
    )
    return None if length is None or accuracy is None else (length, accuracy)


def _draw_point(axis: Axes, arm: Arm, style: LineStyle) -> bool:
    if _path(arm) is not None:
        return False
    length, accuracy = arm.point("response_length_mean"), arm.point("accuracy")
    if length is None or accuracy is None:
        return False
    errors = error_lengths([accuracy.mean], [accuracy.se], share=True)
    axis.errorbar(
        length.mean, accuracy.mean, xerr=length.se, yerr=errors, fmt="none", ecolor=style.color, elinewidth=1.4
    )
    axis.plot(length.mean, accuracy.mean, **style.point(), zorder=7)
    return True


def _draw_level(axis: Axes, arm: Arm, style: LineStyle, name: str, level_index: int, count: int) -> None:
    point = arm.point(name)
    if point is None:
        return
    axis.axhline(point.mean, **style.line())
    # one marker, so that level lines that lie close can be distinguished
    across = (level_index + 1) / (count + 1)
    axis.plot(across, point.mean, **style.point(), transform=axis.get_yaxis_transform(), zorder=4)
    if point.se:
        (below,), (above,) = error_lengths([point.mean], [point.se], share=METRICS[name].share)
        axis.axhspan(point.mean - below, point.mean + above, color=style.color, alpha=0.1, linewidth=0)
