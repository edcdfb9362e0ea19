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

Curves = list[tuple[int, list[Evaluation]]]  # (index of the arm in the cast, one evaluation per seed)


def draw_pass_at_k(cast: Cast) -> Picture | None:
    """Draw pass@k against k, one panel per task. Returns None when nothing measured pass@k for two values of k."""
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
            for order, (arm_index, evaluations) in enumerate(curves):
                _draw_curve(axis, cast.styles[arm_index], evaluations, (order - (len(curves) - 1) / 2) * 0.02)
            if title.startswith("In training") and _draw_start(axis, cast.arms):
                extra = [Line2D([], [], **BEFORE, label="before training (step 0)")]
            _label(axis, title, ks)
        shown_arms = {arm_index for _, curves in views for arm_index, _ in curves}
        png = finish(figure, [pair for arm_index, pair in enumerate(cast.pairs()) if arm_index in shown_arms], extra)
    return Picture(
        name="pass_at_k",
        title="pass@k",
        alt=f"pass@k against k for {len(shown_arms)} arms, in {len(views)} panels",
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
    """Return each task's curves by its name; where files name no task, those of all questions."""
    views: dict[str, dict[int, list[Evaluation]]] = {}
    for arm_index, arm in enumerate(arms):
        data = dict.fromkeys(file.data for run in arm.members for file in run.files)
        for name in data:
            for file in arm.files_on(name):
                for task, evaluation in (file.tasks or {"all questions": file.overall}).items():
                    views.setdefault(task, {}).setdefault(arm_index, []).append(evaluation)
    return [
        (task, curves) for task, evaluations_by_arm in views.items() if (curves := _worth_drawing(evaluations_by_arm))
    ]


def _in_training(arms: Sequence[Arm]) -> list[tuple[str, Curves]]:
    evaluations_by_arm = {arm_index: _end_evaluations(arm, last=True) for arm_index, arm in enumerate(arms)}
    curves = _worth_drawing(evaluations_by_arm)
    return [("In training, last evaluation", curves)] if curves else []


def _end_evaluations(arm: Arm, *, last: bool) -> list[Evaluation]:
    """Return each seed's last evaluation with pass@k; or, not `last`, its first if that is step 0."""
    with_pass_at = [[e for e in run.evaluations if e.pass_at] for run in arm.members]
    if last:
        return [evaluations[-1] for evaluations in with_pass_at if evaluations]
    return [evaluations[0] for evaluations in with_pass_at if evaluations and evaluations[0].step == 0]


def _worth_drawing(evaluations_by_arm: dict[int, list[Evaluation]]) -> Curves:
    return [
        (arm_index, evaluations)
        for arm_index, evaluations in evaluations_by_arm.items()
        if any(len(e.pass_at) > 1 for e in evaluations)
    ]


def _draw_curve(axis: Axes, style: LineStyle, evaluations: Sequence[Evaluation], shift: float) -> None:
    """Draw one arm. shift: how far to the right, in units of log2 k."""
    points = _points(evaluations)
    xs = [k * 2.0**shift for k, _ in points]
    ys = [estimate.mean for _, estimate in points]
    lengths = error_lengths(ys, [estimate.se for _, estimate in points], share=True)
    axis.errorbar(xs, ys, yerr=lengths, **style.marked(), elinewidth=1.2, capsize=2.5)


def _points(evaluations: Sequence[Evaluation]) -> list[tuple[int, Estimate]]:
    """Return (k, pass@k) in the order of k."""
    ks = sorted({k for e in evaluations for k in e.pass_at})
    return [(k, estimate) for k in ks if (estimate := estimate_pass_at(evaluations, k)) is not None]


def _draw_start(axis: Axes, arms: Sequence[Arm]) -> bool:
    """Draw step 0 as one line, and return True, where all arms start from one model and evaluated it."""
    trained = [arm for arm in arms if arm.trained]
    first = [e for arm in trained for e in _end_evaluations(arm, last=False)]
    if not first or len({arm.config("model.hf_path") for arm in trained}) > 1:
        return False
    points = _points(first)
    axis.plot([k for k, _ in points], [estimate.mean for _, estimate in points], **BEFORE)
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
