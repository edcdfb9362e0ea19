"""Does training add answers or only sharpen those that were there? pass@k against k, as in the paper's Fig. 4.

A panel per task of the evaluation.json files; and one of the in-training evaluations, when they measured pass@k.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from megatron_powerflow.metrics.axes import end_at_share
from megatron_powerflow.metrics.names import label
from megatron_powerflow.report.arms import Arm, estimate_pass_at
from megatron_powerflow.report.pictures import GREY, Cast, Picture, finish, in_style, panels, wrapped
from megatron_powerflow.report.plot_style import LineKeywords, LineStyle
from megatron_powerflow.report.runs import Evaluation
from megatron_powerflow.report.seeds import Estimate, error_lengths

MAX_PANELS = 8
MAX_TICKS = 10
BEFORE: LineKeywords = {"color": GREY, "linestyle": ":", "linewidth": 2.2}

Curves = list[tuple[int, list[Evaluation]]]  # (place of the arm in the cast, one evaluation per seed)


def draw_pass_at_k(cast: Cast) -> Picture | None:
    """None when nobody measured pass@k for two values of k."""
    views = [*_by_task(cast.arms), *_in_training(cast.arms)]
    if not views:
        return None
    notes = [f"{len(views) - MAX_PANELS} more tasks are in the table of evaluations only"] * (len(views) > MAX_PANELS)
    views = views[:MAX_PANELS]
    extra = []
    with in_style():
        figure, axes = panels(len(views), height=4.4 if len(views) > 1 else 5.6)
        for axis, (title, curves) in zip(axes, views, strict=True):
            ks = sorted({k for _, evaluations in curves for e in evaluations for k in e.pass_at})
            for order, (place, evaluations) in enumerate(curves):
                _draw_curve(axis, cast.styles[place], evaluations, (order - (len(curves) - 1) / 2) * 0.02)
            if title.startswith("In training") and _draw_start(axis, cast.arms):
                extra = [Line2D([], [], **BEFORE, label="before training (step 0)")]
            _label(axis, title, ks)
        appear = {place for _, curves in views for place, _ in curves}
        png = finish(figure, [pair for place, pair in enumerate(cast.pairs()) if place in appear], extra)
    return Picture(
        name="pass_at_k",
        title="pass@k",
        alt=f"pass@k against k for {len(appear)} arms, in {len(views)} panels",
        caption=(
            "Share of questions with at least one right answer among k responses; k on a logarithmic axis; arms are "
            "shifted a little sideways so that error bars can be told apart. Error bars: one standard error, over "
            "seeds where there are several, else over questions where the evaluation says it. In training: each "
            "seed's last evaluation. A curve that starts higher and ends lower than another has fewer different right "
            "answers to offer."
        ),
        png=png,
        notes=tuple(notes),
    )


def _by_task(arms: Sequence[Arm]) -> list[tuple[str, Curves]]:
    """Tasks by name; where files name none, all questions of each data set."""
    views: dict[str, dict[int, list[Evaluation]]] = {}
    for place, arm in enumerate(arms):
        data = dict.fromkeys(file.data for run in arm.members for file in run.files)
        for name in data:
            for file in arm.files_on(name):
                for task, evaluation in (file.tasks or {"all questions": file.overall}).items():
                    views.setdefault(task, {}).setdefault(place, []).append(evaluation)
    return [(task, curves) for task, found in views.items() if (curves := _worth_drawing(found))]


def _in_training(arms: Sequence[Arm]) -> list[tuple[str, Curves]]:
    found = {place: _ends(arm, last=True) for place, arm in enumerate(arms)}
    curves = _worth_drawing(found)
    return [("In training, last evaluation", curves)] if curves else []


def _ends(arm: Arm, *, last: bool) -> list[Evaluation]:
    """Each seed's last evaluation with pass@k; or its first, if that is step 0."""
    having = [[e for e in run.evaluations if e.pass_at] for run in arm.members]
    if last:
        return [found[-1] for found in having if found]
    return [found[0] for found in having if found and found[0].step == 0]


def _worth_drawing(found: dict[int, list[Evaluation]]) -> Curves:
    return [
        (place, evaluations) for place, evaluations in found.items() if any(len(e.pass_at) > 1 for e in evaluations)
    ]


def _draw_curve(axis: Axes, style: LineStyle, evaluations: Sequence[Evaluation], shift: float) -> None:
    """shift: of log2 k."""
    points = _points(evaluations)
    xs = [k * 2.0**shift for k, _ in points]
    ys = [found.mean for _, found in points]
    lengths = error_lengths(ys, [found.se for _, found in points], share=True)
    axis.errorbar(xs, ys, yerr=lengths, **style.marked(), elinewidth=1.2, capsize=2.5)


def _points(evaluations: Sequence[Evaluation]) -> list[tuple[int, Estimate]]:
    """(k, pass@k), by k."""
    ks = sorted({k for e in evaluations for k in e.pass_at})
    return [(k, found) for k in ks if (found := estimate_pass_at(evaluations, k)) is not None]


def _draw_start(axis: Axes, arms: Sequence[Arm]) -> bool:
    """One line for all arms, where they all start from one model and step 0 was evaluated; False: none."""
    trained = [arm for arm in arms if arm.trained]
    first = [e for arm in trained for e in _ends(arm, last=False)]
    if not first or len({arm.config("model.hf_path") for arm in trained}) > 1:
        return False
    points = _points(first)
    axis.plot([k for k, _ in points], [found.mean for _, found in points], **BEFORE)
    return True


def _label(axis: Axes, title: str, ks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    every = -(-len(ks) // MAX_TICKS)
    axis.xaxis.set_major_locator(FixedLocator(ks[::every]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axis.set_xlabel("k")
    axis.set_ylabel(label("pass_at"))
    end_at_share(axis)
    axis.set_title(wrapped(title, 48))
