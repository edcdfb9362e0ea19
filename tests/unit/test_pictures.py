"""What a reader sees in a picture: whole steps, names in place of keys, shares that end at 0 and 1, KL beside accuracy.

Every figure of a report and of `powerflow curves` is looked at as it is saved.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.axes import step_axis
from megatron_powerflow.metrics.names import METRICS, heading, label
from megatron_powerflow.report import accuracy_and_length, curves, log_z_curves, training_curves
from megatron_powerflow.report.page import build_report
from megatron_powerflow.report.seeds import error_lengths
from tests.report_folders import make_evaluation, make_run

SHARES = {text for key, metric in METRICS.items() if metric.share for text in (label(key), heading(key))}


def make_hard_runs(root: Path) -> list[Path]:
    """Short runs whose shares lie at 0 and 1, with standard errors that go beyond; one has a single step."""
    runs = []
    for seed, accuracy in enumerate((1.0, 0.9, 0.0)):
        run = make_run(root / f"run_{seed}", seed=seed, name="mine", last=3, trap=True)
        evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
        lines = []
        for step in (0, 3):
            shares = {
                "accuracy": accuracy,
                "truncated_fraction": 1 - accuracy,
                "distinct_2": accuracy,
                "distinct_3": 1.0,
            }
            pass_at = {"1": accuracy, "2": 1.0, "4": 1.0}
            lines.append(json.dumps({**evaluations[0], **shares, "step": step, "pass_at": pass_at}) + "\n")
        (run / "evaluations.jsonl").write_text("".join(lines))
        make_evaluation(run / "evaluation", accuracy=0.01 + 0.98 * accuracy, model="step_000003", slope=3.0)
        runs.append(run)
    runs.append(make_run(root / "single", seed=0, preset="rl_token", name="other", last=1))
    runs.append(make_evaluation(root / "base", accuracy=0.99, model="base"))
    return runs


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> list[Figure]:
    """All figures of a report and of the curves of the same runs, as they are when they are saved."""
    kept: list[Figure] = []
    original = Figure.savefig

    def savefig(self, *arguments, **named):
        kept.append(self)
        return original(self, *arguments, **named)

    root = tmp_path_factory.mktemp("pictures")
    runs = make_hard_runs(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        build_report(runs, root / "report", "powerflow report")
        curves.draw_curves(runs[:-1], root / "all.png")
        curves.draw_curves(runs[:1], runs[0] / "curves.png")
    assert len(kept) == 9
    return kept


def axes_of(figures: list[Figure]) -> list[Axes]:
    return [axis for figure in figures for axis in figure.axes]


def ticks_in_view(axis: Axes) -> list[float]:
    low, high = axis.get_xlim()
    return [tick for tick in axis.get_xticks() if low <= tick <= high]


@pytest.mark.slow
def test_steps_are_whole_numbers(figures):
    over_steps = [axis for axis in axes_of(figures) if axis.get_xlabel() == "step"]
    assert len(over_steps) > 40
    for axis in over_steps:
        ticks = ticks_in_view(axis)
        assert ticks, axis.get_title()
        assert all(float(tick).is_integer() for tick in ticks), (axis.get_title(), ticks)


@pytest.mark.parametrize("last", [0, 1, 2, 5, 17, 339, 100_000])
def test_runs_of_any_length_have_whole_steps(last):
    axis = Figure().subplots()
    axis.plot([0, last], [0.0, 1.0], marker="o")
    step_axis(axis)
    ticks = ticks_in_view(axis)
    assert 1 <= len(ticks) <= 12
    assert all(float(tick).is_integer() for tick in ticks)


def test_no_key_of_a_file_is_shown_to_a_reader(figures):
    for figure in figures:
        for text in figure.findobj(Text):
            assert not any(key in text.get_text() for key in METRICS if "_" in key), text.get_text()


def test_every_metric_that_is_drawn_has_one_name():
    assert len({label(key) for key in METRICS}) == len(METRICS)
    assert (label("response_length_mean"), heading("accuracy")) == ("mean response length (tokens)", "Accuracy")
    drawn = [name for panel in curves.PANELS for name in (*panel.lines, *(panel.band or ()))]
    for panel in (*training_curves.PANELS, *log_z_curves.PANELS):
        drawn += [name for name in (panel.name, panel.thin) if name]
    assert set(drawn) | set(accuracy_and_length.BY_STEP) <= METRICS.keys()


def share_limits(axis: Axes) -> list[tuple[str, tuple[float, float]]]:
    title = axis.get_title(loc="left").split(";")[0]
    found = [("y", axis.get_ylim())] if title in SHARES or axis.get_ylabel().split(" (")[0] in SHARES else []
    return found + ([("x", axis.get_xlim())] if axis.get_xlabel().split(" (")[0] in SHARES else [])


def test_axes_bars_and_bands_of_shares_end_at_0_and_1(figures):
    looked_at = 0
    for axis in axes_of(figures):
        for which, (low, high) in share_limits(axis):
            assert 0 <= low < high <= 1, (axis.get_title(loc="left"), low, high)
            for patch in axis.patches:  # a level line's band
                corners = patch.get_bbox().get_points()[:, 0 if which == "x" else 1]
                assert 0 <= min(corners) <= max(corners) <= 1
            for drawn in axis.collections:  # error bars and bands
                for path in drawn.get_paths():
                    values = path.vertices[:, 0 if which == "x" else 1]
                    if len(values):
                        assert -1e-9 <= np.min(values) <= np.max(values) <= 1 + 1e-9, axis.get_title(loc="left")
                        looked_at += 1
    assert looked_at > 20


def test_a_marker_at_the_end_of_a_share_is_drawn_whole(figures):
    for axis in axes_of(figures):
        if share_limits(axis):
            assert not any(line.get_clip_on() for line in axis.lines)


def test_error_bars_by_hand():
    below, above = error_lengths([0.0, 0.5, 0.95, 1.0], [0.1, 0.1, 0.1, None], share=True)
    assert below == pytest.approx([0.0, 0.1, 0.1, 0.0])
    assert above == pytest.approx([0.1, 0.1, 0.05, 0.0])
    assert error_lengths([15.0], [20.0], share=False).tolist() == [[20.0], [20.0]]


def test_kl_and_truncated_share_stand_beside_accuracy(figures):
    wanted = {"Accuracy", "KL to the base model (nats per response)", "Truncated share"}
    titles = [{axis.get_title(loc="left").split(";")[0] for axis in figure.axes} for figure in figures]
    assert sum(wanted <= found for found in titles) == 2  # by step of evaluation, and of training
    one_run = [axis.get_title(loc="left") for axis in figures[-1].axes][:3]  # curves.png
    assert one_run == ["Accuracy", "KL to the base model (nats per response)", "Truncated and boxed responses"]


def test_curves_of_one_run_name_lines_and_of_several_runs_too(figures):
    def names(figure: Figure) -> set[str]:
        return {text.get_text() for axis in figure.axes if axis.get_legend() for text in axis.get_legend().get_texts()}

    assert {"truncated share", "share with a boxed answer", "realised alpha", "asked alpha"} <= names(figures[-1])
    assert {"run_0", "run_1: truncated share", "single: median residual"} <= names(figures[-2])


def test_curves_need_a_number_that_they_show(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "lr": 1.0}\n')
    with pytest.raises(UserError, match="none of the numbers that curves show"):
        curves.draw_curves([tmp_path], tmp_path / "curves.png")


def test_curves_leave_numbers_out_that_are_not_finite(tmp_path):
    lines = [{"step": step, "loss": float("inf") if step == 1 else 1.0, "grad_norm": float("nan")} for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves.draw_curves([tmp_path], tmp_path / "curves.png").is_file()
