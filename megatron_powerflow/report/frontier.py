"""Who is better on quality and diversity at once? The Pareto side of a reference, shaded.

Two sources, never mixed within a trained arm: paths through the in-training evaluations, and points of the
evaluation.json files, which may have been taken on other questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from megatron_powerflow.metrics.axes import end_at_share
from megatron_powerflow.metrics.names import METRICS, label
from megatron_powerflow.report.accuracy_and_length import END, START
from megatron_powerflow.report.arms import Arm, estimate_of
from megatron_powerflow.report.pictures import GREY, Cast, Picture, finish, in_style, panels
from megatron_powerflow.report.plot_style import LineStyle
from megatron_powerflow.report.runs import Evaluation
from megatron_powerflow.report.seeds import Estimate, error_lengths, estimate

DIVERSITY = ("embedding_distance", "strategies", "distinct_2", "distinct_3", "distinct_1")  # more is more diverse
QUALITY = ("quality", "accuracy")
MAX_PANELS = 2  # of each source


@dataclass(frozen=True, slots=True)
class Point:
    """A point holds an arm's means over seeds in the plane. Example: diversity .31 ± .01, quality .78 ± .02."""

    x: Estimate
    y: Estimate


@dataclass(frozen=True, slots=True)
class View:
    """A view is what one panel shows: the two metrics, their source, and each arm's path in step order (one point
    where there is only one evaluation)."""

    x_name: str
    y_name: str
    in_training: bool
    paths: tuple[tuple[int, tuple[Point, ...]], ...]  # (index of the arm in the cast, its points)


def draw_frontier(cast: Cast) -> Picture | None:
    """Draw quality against diversity, with the better side of a reference shaded. Returns None when no arm has both."""
    views = _views(cast.arms)
    if not views:
        return None
    references, notes = [], []
    with in_style():
        figure, axes = panels(len(views), height=5.2 if len(views) > 1 else 6.0)
        for axis, view in zip(axes, views, strict=True):
            references.append(_draw_view(axis, cast, view))
        shown_arms = {arm_index for view in views for arm_index, _ in view.paths}
        extra = []
        if any(len(path) > 1 for view in views for _, path in view.paths):
            extra.append(Line2D([], [], **START, color=GREY, label="first evaluation"))
            extra.append(Line2D([], [], **END, color=GREY, label="last evaluation"))
        png = finish(figure, [pair for arm_index, pair in enumerate(cast.pairs()) if arm_index in shown_arms], extra)
    absent = [arm.label for arm_index, arm in enumerate(cast.arms) if arm_index not in shown_arms]
    if absent:
        notes.append(f"neither quality against diversity in: {'; '.join(absent)}")
    named = "; ".join(dict.fromkeys(references))
    return Picture(
        name="quality_against_diversity",
        title="Quality against diversity",
        alt=f"Quality against diversity of {len(shown_arms)} arms; the side better than {named} on both is shaded",
        caption=(
            f"Shaded: better than the reference on both axes. Reference: {named}. Error bars: one standard error, over "
            "seeds where there are several, else over questions where the evaluation says it. Diversity depends on "
            "the number of responses per question: compare like with like (table of evaluations). A thin grey line "
            "joins one model's evaluations in the order of their temperatures."
        ),
        png=png,
        notes=tuple(notes),
    )


def _views(arms: Sequence[Arm]) -> list[View]:
    views = []
    for in_training in (True, False):
        candidates = []
        for x_name, y_name in product(DIVERSITY, QUALITY):
            arm_paths = [(arm_index, _path(arm, in_training, x_name, y_name)) for arm_index, arm in enumerate(arms)]
            paths = tuple((arm_index, path) for arm_index, path in arm_paths if path)
            if len(paths) > 1 or any(len(path) > 1 for _, path in paths):
                candidates.append(View(x_name, y_name, in_training, paths))
        # without a trained arm it shows nothing that the other source does not
        with_trained = [view for view in candidates if any(arms[arm_index].trained for arm_index, _ in view.paths)]
        views += (
            with_trained[:MAX_PANELS] if any(arm.trained for arm in arms) or in_training else candidates[:MAX_PANELS]
        )
    return views


def _path(arm: Arm, in_training: bool, x_name: str, y_name: str) -> tuple[Point, ...]:
    if not arm.trained or not in_training:
        return _mean_point([file.overall for file in arm.measured()], x_name, y_name)
    by_step: dict[int, list[Evaluation]] = {}
    for run in arm.members:
        for e in run.evaluations:
            if x_name in e.values and y_name in e.values:
                by_step.setdefault(e.step, []).append(e)
    return tuple(point for step in sorted(by_step) for point in _mean_point(by_step[step], x_name, y_name))


def _mean_point(evaluations: Sequence[Evaluation], x_name: str, y_name: str) -> tuple[Point, ...]:
    both = [e for e in evaluations if x_name in e.values and y_name in e.values]
    x, y = estimate_of(both, x_name), estimate_of(both, y_name)
    return () if x is None or y is None else (Point(x, y),)


def _draw_view(axis: Axes, cast: Cast, view: View) -> str:
    """Draw one view and return the name of its reference."""
    for arm_index, path in view.paths:
        _draw_path(axis, cast.styles[arm_index], path, view)
    for one, other in _temperature_steps(cast, view):
        axis.plot([one.x.mean, other.x.mean], [one.y.mean, other.y.mean], color="#999999", linewidth=1.3, zorder=1.6)
    name, reference = _reference(cast.arms, view)
    axis.margins(0.08)
    corner = (reference.x.mean, reference.y.mean)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    right = max(right, corner[0] + 0.22 * (right - left))  # room for the shaded side, wherever the reference lies
    top = max(top, corner[1] + 0.16 * (top - bottom))
    right = min(right, 1.0) if METRICS[view.x_name].share else right
    top = min(top, 1.0) if METRICS[view.y_name].share else top
    axis.fill_between([corner[0], right], corner[1], top, color="#8a8a8a", alpha=0.16, linewidth=0, zorder=0.5)
    axis.plot([corner[0], corner[0], right], [top, corner[1], corner[1]], color=GREY, linewidth=1.0, zorder=0.6)
    axis.set_xlim(left, right)
    axis.set_ylim(bottom, top)
    for name_of, x in ((view.x_name, True), (view.y_name, False)):
        if METRICS[name_of].share:
            end_at_share(axis, x=x)
    axis.annotate(
        "better\non both", (1, 1), xycoords="axes fraction", xytext=(-6, -6), textcoords="offset points",
        ha="right", va="top", color="#333333", style="italic",
    )  # fmt: skip
    axis.set_xlabel(f"{label(view.x_name)} (diversity)")
    axis.set_ylabel(f"{label(view.y_name)} (quality)")
    axis.set_title("In training" if view.in_training else "Evaluation files")
    return name


def _draw_path(axis: Axes, style: LineStyle, path: Sequence[Point], view: View) -> None:
    xs, ys = [p.x.mean for p in path], [p.y.mean for p in path]
    x_lengths = error_lengths(xs, [p.x.se for p in path], share=METRICS[view.x_name].share)
    y_lengths = error_lengths(ys, [p.y.se for p in path], share=METRICS[view.y_name].share)
    alpha = 0.35 if len(path) > 1 else 0.9
    axis.errorbar(xs, ys, xerr=x_lengths, yerr=y_lengths, fmt="none", ecolor=style.color, alpha=alpha)
    if len(path) == 1:
        axis.plot(xs, ys, **style.point(), zorder=7)
        return
    axis.plot(xs, ys, **style.marked(), zorder=3)
    axis.plot(xs[-1], ys[-1], **END, color=style.color, zorder=5)
    axis.plot(xs[0], ys[0], **START, color=style.color, zorder=6)


def _temperature_steps(cast: Cast, view: View) -> list[tuple[Point, Point]]:
    """Return the pairs of neighbouring temperatures of each model that was evaluated at several."""
    by_model: dict[str, list[tuple[float, Point]]] = {}
    for arm_index, path in view.paths:
        arm = cast.arms[arm_index]
        file = None if arm.trained else arm.measured()[0]
        if file is not None and file.temperature is not None:
            by_model.setdefault(file.model, []).append((file.temperature, path[0]))
    ordered = [sorted(points_of_model, key=lambda item: item[0]) for points_of_model in by_model.values()]
    return [(one, other) for points_of_model in ordered for (_, one), (_, other) in pairwise(points_of_model)]


def _reference(arms: Sequence[Arm], view: View) -> tuple[str, Point]:
    """Choose the point to compare with, and its name.

    It is where training starts if all arms start from one model and it was evaluated; else the first arm that was
    only evaluated; else the first arm.
    """
    trained = [(arms[arm_index], path) for arm_index, path in view.paths if arms[arm_index].trained]
    starts = {arm.config("model.hf_path") for arm, _ in trained}
    first = [path[0] for arm, path in trained if view.in_training and _starts_at_0(arm)]
    x, y = estimate([p.x.mean for p in first]), estimate([p.y.mean for p in first])
    if x is not None and y is not None and len(starts) == 1:
        return "the policy before training (step 0, mean over arms)", Point(x, y)
    evaluated = [(arms[arm_index], path) for arm_index, path in view.paths if not arms[arm_index].trained]
    arm, path = (evaluated or trained)[0]
    return arm.label, path[0]


def _starts_at_0(arm: Arm) -> bool:
    return all(run.evaluations and run.evaluations[0].step == 0 for run in arm.members)
