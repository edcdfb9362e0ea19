"""The report: its numbers are those of the files, its arms those of the configs, its pictures whole."""

from __future__ import annotations

import io
import json
import shlex
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.alarm import ALARMS
from megatron_powerflow.report.arms import group_runs
from megatron_powerflow.report.page import build_report
from megatron_powerflow.report.runs import natural, read_runs
from megatron_powerflow.report.seeds import band, estimate
from tests.conftest import run_cli
from tests.html_tables import Tables
from tests.report_folders import make_evaluation, make_run


def page_of(folders, out: Path) -> str:
    return build_report(folders, out, "powerflow report ...").read_text(encoding="utf-8")


def arms_of(*folders: Path):
    return group_runs(read_runs(folders, []))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """Three seeds of two arms, one of a third, and the base model at two temperatures."""
    root = tmp_path_factory.mktemp("runs")
    made = []
    for seed in range(3):
        made.append(make_run(root / f"la_tb_{seed}", seed=seed, trap=True))
        made.append(make_run(root / f"tb_traj_{seed}", seed=seed, preset="tb_traj", log_z="mlp"))
        run = made[0 if not seed else -2]
        make_evaluation(run / "evaluation", accuracy=0.6 + 0.02 * seed, model=f"{run}/checkpoints/step_000275")
    made.append(make_run(root / "rl_token", seed=0, preset="rl_token"))
    made.append(make_evaluation(root / "base", accuracy=0.41, diversity={"distinct_2": 0.62}))
    made.append(make_evaluation(root / "cold", accuracy=0.97, temperature=0.25, diversity={"distinct_2": 0.3}))
    return made


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory) -> Path:
    return build_report(folders, tmp_path_factory.mktemp("report"), "powerflow report ...").parent


@pytest.fixture(scope="module")
def page(report) -> str:
    return (report / "index.html").read_text(encoding="utf-8")


def shown(values: list[float], decimals: int) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.{decimals}f} ± {error:.{decimals}f}"


@pytest.mark.parametrize("arm", ["la_tb", "tb_traj"])
@pytest.mark.parametrize("which", ["best", "last"])
def test_the_table_says_what_the_files_say(arm, which, folders, page):
    """Each seed's evaluation picked, averaged and given a standard error anew, from the lines themselves."""
    rows = Tables(page).tables[0]
    header, place = rows[0], next(i for i, row in enumerate(rows) if row[0].startswith(arm))
    row = rows[place][1:] if which == "best" else rows[place + 1]  # the arm's cell spans both lines
    cells = dict(zip(header[1:], row, strict=True))
    picked = []
    for seed in range(3):
        folder = next(path for path in folders if path.name == f"{arm}_{seed}")
        lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        picked.append(max(lines, key=lambda line: line["accuracy"]) if which == "best" else lines[-1])
    expected = {
        "accuracy": ("accuracy", 3),
        "majority accuracy": ("maj", 3),
        "mean response length (tokens)": ("response_length_mean", 1),
        "truncated share": ("truncated_fraction", 3),
        "share with a boxed answer": ("boxed_rate", 3),
        "policy entropy (nats per token)": ("policy_entropy", 3),
    }
    for title, (name, decimals) in expected.items():
        assert cells[title] == shown([line[name] for line in picked], decimals), title
    for k in (1, 16):
        assert cells[f"pass@{k}"] == shown([line["pass_at"][str(k)] for line in picked], 3)
    steps = sorted({line["step"] for line in picked})
    assert cells["evaluation"].endswith(f"{steps[0]}" if len(steps) == 1 else f"{steps[0]}–{steps[-1]}")


def test_alpha_asked_and_realised(folders, page):
    """Over the last ten steps: seeds with their standard error, one with its interval."""
    table = next(table for table in Tables(page).tables if "asked" in table[0])
    assert table[0][1:] == ["asked", "realised", "R²", "λ realised", "over"]
    rows = {
        next(arm for arm in ("la_tb", "tb_traj", "rl_token") if row[0].startswith(arm)): row[1:] for row in table[1:]
    }
    last = {}
    for folder in folders:
        if (folder / "metrics.jsonl").is_file():
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-10:]
            names = ("alpha_realised", "alpha_realised_low", "alpha_realised_high")
            last[folder.name] = [statistics.fmean(line[name] for line in lines) for name in names]
    for arm in ("la_tb", "tb_traj"):
        assert rows[arm][0] == "4"
        assert rows[arm][1] == shown([last[f"{arm}_{seed}"][0] for seed in range(3)], 2)
    middle, low, high = last["rl_token"]
    assert rows["rl_token"][1] == f"{middle:.2f} [{low:.2f}, {high:.2f}]"
    assert rows["rl_token"][4] == "steps 265–274"


def test_one_seed_has_the_standard_error_of_its_questions(folders, page):
    rows = Tables(page).tables[0]
    cold = next(row for row in rows if row[0].startswith("toy-base T=0.25"))
    assert cold[2] == f"0.970 ± {(0.97 * 0.03 / 48) ** 0.5:.3f}†"
    single = next(row for row in rows if row[0].startswith("rl_token"))
    assert single[2].endswith(" ± 0.010†")
    assert "1 seed," in single[0]


def test_best_is_called_a_maximum_over_noisy_evaluations(page):
    assert "maximum over noisy evaluations" in page
    assert "best* at" in page


def test_estimates_by_hand():
    assert estimate([]) is None
    assert estimate([1.0, 2.0, 6.0]).mean == 3
    assert estimate([1.0, 2.0, 6.0]).se == pytest.approx((((4 + 1 + 9) / 2) ** 0.5) / 3**0.5)
    assert estimate([1.0, 2.0, 6.0]).over == "seeds"
    assert (estimate([0.5], [0.1]).se, estimate([0.5], [0.1]).over) == (0.1, "questions")
    assert (estimate([0.5]).se, estimate([0.5]).over) == (None, None)


def test_bands_by_hand():
    found = band([{0: 1.0, 1: 2.0}, {0: 3.0, 1: 6.0, 2: 9.0}])
    assert found.steps.tolist() == [0, 1, 2]
    assert found.mean.tolist() == [2, 4, 9]  # over the seeds that have the step
    assert (found.low.tolist(), found.high.tolist()) == ([1, 2, 9], [3, 6, 9])
    assert found.se.tolist() == [pytest.approx(1), pytest.approx(2), 0]
    binned = band([{step: float(step) for step in range(100)}], max_points=10)
    assert binned.steps.tolist() == binned.mean.tolist() == [4.5 + 10 * place for place in range(10)]
    assert band([]) is None


def test_seeds_of_a_configuration_are_one_arm_and_labels_say_what_differs(tmp_path):
    a = [make_run(tmp_path / f"a{seed}", seed=seed, evaluated=False, last=275 if seed else 25) for seed in (1, 0)]
    b = make_run(tmp_path / "b", seed=0, alpha=0.5, evaluated=False)
    c = make_run(tmp_path / "c", seed=0, preset="tb_traj", log_z="mlp", evaluated=False)
    arms = arms_of(*a, b, c)
    assert [arm.label for arm in arms] == ["la_tb α=4", "la_tb α=0.5", "tb_traj α=4"]
    assert [run.seed for run in arms[0].members] == ["0", "1"]
    assert [arm.label for arm in arms_of(a[0])] == ["la_tb α=4"]
    assert [arm.label for arm in arms_of(a[0], c)] == ["la_tb", "tb_traj"]


def test_a_name_given_to_the_runs_is_their_label(tmp_path):
    named = [make_run(tmp_path / f"n{seed}", seed=seed, name="mine", evaluated=False) for seed in (0, 1)]
    other = make_run(tmp_path / "o", seed=0, alpha=2.0, name="mine", evaluated=False)
    assert [(arm.label, len(arm.members)) for arm in arms_of(*named, other)] == [("mine", 2), ("mine (2)", 1)]


def test_an_evaluation_in_a_run_is_a_line_of_its_arm(folders, page):
    """Three seeds of la_tb, each with RUN/evaluation, of accuracies .60, .62 and .64."""
    table = Tables(page).tables[0]
    place = next(place for place, row in enumerate(table) if row[0].startswith("la_tb"))
    line = dict(zip(table[0][1:], table[place + 2], strict=True))
    assert line["evaluation"] == "step_000275 on held_out.jsonl, T=1"
    assert line["accuracy"] == shown([0.60, 0.62, 0.64], 3)
    assert line["truncated share"] == "0.002 ± 0.000"


@pytest.mark.slow
def test_a_run_without_evaluations_in_training_has_the_line_of_its_evaluation_alone(tmp_path):
    runs = [make_run(tmp_path / name, seed=0, preset=name, evaluated=False) for name in ("la_tb", "rl_token")]
    make_evaluation(runs[0] / "evaluation", accuracy=0.7, model="step_000275")
    make_evaluation(runs[0] / "step_300", accuracy=0.1, model="step_000300")  # a later name; not the run's own
    out = tmp_path / "out"
    rows = Tables(page_of(runs, out)).tables[0]
    assert [row[1] for row in rows[1:]] == ["step_000275 on held_out.jsonl, T=1", "not evaluated"]
    assert rows[1][2].startswith("0.700 ± ")
    assert (out / "accuracy_against_length.png").is_file()


@pytest.mark.slow
def test_an_evaluation_of_the_base_model_is_in_no_row_of_the_trained_arm(tmp_path):
    """`powerflow evaluate --reference` writes the base model's path."""
    run = make_run(tmp_path / "run", seed=0, evaluated=False, hf_path="/models/toy-base")
    base = make_evaluation(run / "evaluation", accuracy=0.4, model="/models/toy-base")
    page = page_of([run], tmp_path / "out")
    assert [row[1] for row in Tables(page).tables[0][1:]] == ["not evaluated"]
    assert "an evaluation of the base model; it is in no row of the trained arm" in page
    assert [arm.label for arm in arms_of(run, base)] == ["la_tb α=4", "toy-base T=1"]


def test_evaluations_alone_are_arms_by_model_and_temperature(tmp_path):
    one = make_evaluation(tmp_path / "a", accuracy=0.4, seed=0)
    other_seed = make_evaluation(tmp_path / "b", accuracy=0.5, seed=1)
    other_data = make_evaluation(tmp_path / "c", accuracy=0.9, seed=0, data="other.jsonl")
    cold = make_evaluation(tmp_path / "d", accuracy=0.8, temperature=0.25)
    arms = arms_of(one, other_seed, other_data, cold)
    assert [arm.label for arm in arms] == ["toy-base T=1", "toy-base T=0.25"]
    assert arms[0].point("accuracy").mean == pytest.approx(0.45)  # of the first data; the other is another measurement
    assert [file.data for file in arms[0].files_on("other.jsonl")] == ["other.jsonl"]


def test_the_last_evaluation_of_a_run_is_the_one_with_the_highest_step(tmp_path):
    run = make_run(tmp_path / "run", seed=0)
    for step, accuracy in ((9, 0.2), (100, 0.7), (20, 0.3)):
        make_evaluation(run / f"step_{step}", accuracy=accuracy, model=f"step_{step}")
    (arm,) = arms_of(run)
    assert arm.files_on("held_out.jsonl")[0].overall.values["accuracy"] == 0.7
    assert sorted(["s10", "s9", "s²", ""], key=natural) == ["", "s9", "s10", "s²"]


def test_everything_wrong_is_said_at_once(tmp_path):
    run = make_run(tmp_path / "run", seed=0, evaluated=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        build_report([run, run, tmp_path / "none", tmp_path / "empty"], tmp_path / "out", "")
    found = "\n".join(caught.value.violations)
    assert len(caught.value.violations) == 3
    assert "given twice" in found
    assert "no such folder" in found
    assert "no step in metrics.jsonl" in found
    assert not (tmp_path / "out").exists()


def test_one_seed_given_twice_is_not_two_seeds(tmp_path):
    runs = [make_run(tmp_path / name, seed=3, evaluated=False) for name in ("a", "b")]
    with pytest.raises(UserError, match="same seed 3; they are one measurement"):
        build_report(runs, tmp_path / "out", "")


def test_a_place_that_cannot_be_written_is_the_users_mistake(tmp_path, folders):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a file; name a folder"):
        build_report(folders[-1:], tmp_path / "file", "")


def test_a_missing_metric_leaves_its_panel_out_and_is_named(tmp_path):
    run = make_run(tmp_path / "run", seed=0, evaluated=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["grad_norm"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of([run], tmp_path / "out")
    assert "no run has the panel Gradient norm, grad_norm in metrics.jsonl" in page
    assert "no run has the panel Loss" not in page
    assert "No picture: no folder has evaluations with an accuracy" in page


@pytest.mark.slow
def test_alarms_are_shown_by_their_names(tmp_path):
    """A run of an older version has one alarm without a name: that on lengths."""
    for name, alarms in (
        ("new", {"alarm": 1.0, "alarm_length": 0.0, "alarm_loss": 1.0, "alarm_short": 1.0}),
        ("old", {"alarm": 1.0}),
    ):
        run = make_run(tmp_path / name, seed=0, trap=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            line.update({key: value * (line["step"] >= 3) for key, value in alarms.items()})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        page = page_of([run], tmp_path / f"report_{name}")
        found = {alarm for alarm in ALARMS if f"alarm {alarm}, first at step 3" in page}
        assert found == ({"loss", "short"} if name == "new" else {"length"})


def test_the_reference_of_the_shaded_side_is_named(page, tmp_path):
    assert "Reference: the policy before training (step 0, mean over arms)" in page
    alone = [make_evaluation(tmp_path / f"t{t}", accuracy=a, temperature=t) for t, a in ((1.0, 0.4), (0.5, 0.8))]
    assert "Reference: toy-base T=1." in page_of(alone, tmp_path / "out")


@pytest.mark.slow
def test_the_page_says_which_commands_and_versions_made_the_runs(tmp_path):
    made = [make_run(tmp_path / f"s{seed}", seed=seed, evaluated=False) for seed in range(3)]
    page = page_of(made, tmp_path / "out")
    assert "3 × start of a run" in page
    assert "megatron-core 0.16.1, python 3.11.7" in page
    assert all(f"powerflow train la_tb.yaml run.seed={seed}" in page for seed in range(3))


def test_pictures_on_the_page_are_the_files(report, page):
    inlined = [attributes["src"] for tag, attributes in Tables(page).tags if tag == "img"]
    files = sorted(report.glob("*.png"))
    assert len(inlined) == len(files) == 7
    for path in files:
        picture = Image.open(path)
        assert picture.size[0] == 1650
        assert picture.info.keys() <= {"dpi"}  # no dates, no versions


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(folders, report, tmp_path):
    again = build_report(folders, tmp_path, "powerflow report ...").parent
    for path in report.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_nothing_is_cut_at_the_edge_of_a_picture_with_many_long_names(tmp_path):
    made = []
    for place in range(14):
        name = f"arm number {place} with a name as long as people make them, or longer"
        preset = ("la_tb", "rl_token", "tb_traj", "tb_token")[place % 4]
        made.append(make_run(tmp_path / f"r{place}", seed=0, preset=preset, alpha=1.0 + place, name=name, trap=True))
    out = build_report(made, tmp_path / "out", "").parent
    pictures = sorted(out.glob("*.png"))
    assert len(pictures) == 7
    for path in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"))
        for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]):
            assert (edge == 255).all(), path.name


def test_a_run_inside_a_run_is_another_run(tmp_path):
    outer = make_run(tmp_path / "outer", seed=0, evaluated=False)
    make_evaluation(make_run(outer / "inner", seed=1, evaluated=False) / "evaluation", accuracy=0.5, model="step_275")
    assert not arms_of(outer)[0].members[0].files
    assert arms_of(outer / "inner")[0].members[0].files


@pytest.mark.slow
def test_the_command_says_where_the_page_is_and_the_page_which_command_it_was(tmp_path):
    run = make_run(tmp_path / "a run", seed=0, evaluated=False, last=25)
    done = run_cli("report", run, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "out" / "index.html"))
    said = shlex.join(["powerflow", "report", str(run), "--out", str(tmp_path / "out")]).replace("'", "&#39;")
    assert said in (tmp_path / "out" / "index.html").read_text()
    refused = run_cli("report", tmp_path / "none", "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
