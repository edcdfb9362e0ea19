"""Does accuracy rise at a stable length, or does an arm collapse? The two pictures of the paper's Fig. 3.

From evaluations.jsonl; arms that were only evaluated are a point, or a level line.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megatron_powerflow.metrics.plot_style import LineStyle
from megatron_powerflow.report.arms import Arm
from megatron_powerflow.report.pictures import GREY, Cast, Picture, draw_band, finish, in_style, panels
from megatron_powerflow.report.seeds import band

START = {"marker": "o", "markerfacecolor": "white", "markersize": 10, "markeredgewidth": 1.8, "linestyle": "none"}
END = {"marker": "*", "markersize": 17, "markeredgecolor": "white", "markeredgewidth": 0.8, "linestyle": "none"}


def draw_accuracy_against_length(cast: Cast) -> Picture | None:
    """The path of each arm through (mean length, accuracy). None without in-training evaluations."""
    paths = [(arm, style) for arm, style in cast.pairs() if _path(arm) is not None]
    if not paths:
        return None
    with in_style():
        figure, (axis,) = panels(1, height=6.0)
        points = [(arm, style) for arm, style in cast.pairs() if _draw_point(axis, arm, style)]
        for arm, style in paths:
            length, accuracy = _path(arm)
            axis.errorbar(
                length.mean, accuracy.mean, xerr=length.se, yerr=accuracy.se, fmt="none", ecolor=style.color, alpha=0.35
            )
            axis.plot(length.mean, accuracy.mean, **style.marked(), zorder=3)
        for arm, style in paths:  # over every line
            length, accuracy = _path(arm)
            axis.plot(length.mean[-1], accuracy.mean[-1], **END, color=style.color, zorder=5)
            axis.plot(length.mean[0], accuracy.mean[0], **START, color=style.color, zorder=6)
        axis.set_xlabel("mean response length (tokens)")
        axis.set_ylabel("accuracy")
        extra = [Line2D([], [], **START, color=GREY, label="first evaluation")]
        extra.append(Line2D([], [], **END, color=GREY, label="last evaluation"))
        png = finish(figure, [pair for pair in cast.pairs() if pair in paths or pair in points], extra)
    return Picture(
        name="accuracy_against_length",
        title="Accuracy against length",
        alt=f"Accuracy against mean response length, one path in step order for each of {len(paths)} arms",
        caption=(
            "Each arm's in-training evaluations in step order, mean over seeds, with one standard error over seeds "
            "in both directions where there is more than one. Up is better; a path that runs off to one side has "
            "lost its length: to the left it answers without reasoning, to the right it repeats itself until it is cut."
        ),
        png=png,
    )


def draw_accuracy_and_length_by_step(cast: Cast) -> Picture | None:
    """Two panels against step; level dashed lines for arms that were only evaluated."""
    trained = [(arm, style) for arm, style in cast.pairs() if arm.evaluated("accuracy")]
    if not trained:
        return None
    level = [(arm, style) for arm, style in cast.pairs() if not arm.trained and arm.point("accuracy")]
    with in_style():
        figure, axes = panels(2, height=4.6)
        for axis, name, title in zip(
            axes, ("accuracy", "response_length_mean"), ("Accuracy", "Mean response length (tokens)"), strict=True
        ):
            for arm, style in trained:
                draw_band(axis, style, arm.evaluated(name))
            for place, (arm, style) in enumerate(level):
                _draw_level(axis, arm, style, name, place, len(level))
            axis.set_title(title)
            axis.set_xlabel("step")
        png = finish(figure, trained + level)
    return Picture(
        name="accuracy_and_length_by_step",
        title="Accuracy and length against step",
        alt=f"Accuracy and mean response length against step for {len(trained)} arms, {len(level)} more as level lines",
        caption=(
            "In-training evaluations. Line: mean over seeds; band: from the lowest to the highest seed. Level lines: "
            "arms that were evaluated and not trained, whose questions may be others than those of the in-training "
            "evaluations (see the table of evaluations)."
        ),
        png=png,
    )


def _path(arm: Arm):
    """(length, accuracy) bands at the steps that have both, or None."""
    both = [
        [e for e in run.evaluations if "accuracy" in e.values and "response_length_mean" in e.values]
        for run in arm.members
    ]
    both = [found for found in both if found]
    if not both:
        return None
    bands = [
        band([{e.step: e.values[name] for e in found} for found in both], max_points=10**9)
        for name in ("response_length_mean", "accuracy")
    ]
    return bands[0], bands[1]


def _draw_point(axis: Axes, arm: Arm, style: LineStyle) -> bool:
    if arm.trained:
        return False
    length, accuracy = arm.point("response_length_mean"), arm.point("accuracy")
    if length is None or accuracy is None:
        return False
    axis.errorbar(
        length.mean, accuracy.mean, xerr=length.se, yerr=accuracy.se, fmt="none", ecolor=style.color, elinewidth=1.4
    )
    axis.plot(length.mean, accuracy.mean, **style.point(), zorder=7)
    return True


def _draw_level(axis: Axes, arm: Arm, style: LineStyle, name: str, place: int, count: int) -> None:
    point = arm.point(name)
    if point is None:
        return
    axis.axhline(point.mean, **style.line())
    # one marker, so that level lines that lie close are told apart
    across = (place + 1) / (count + 1)
    axis.plot(across, point.mean, **style.point(), transform=axis.get_yaxis_transform(), zorder=4)
    if point.se:
        axis.axhspan(point.mean - point.se, point.mean + point.se, color=style.color, alpha=0.1, linewidth=0)
