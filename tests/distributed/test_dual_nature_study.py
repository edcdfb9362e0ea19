"""The study of examples/dual_nature, every part of it at a small size: a base, arms, seeds, tables, report."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.dual_nature import corpus
from examples.dual_nature import vocabulary as v
from examples.dual_nature.arms import ARMS, GROUPS, Arm, Measured, Plan
from examples.dual_nature.measure import Sample, describe
from examples.dual_nature.pretrain import RECIPES, make_base
from examples.dual_nature.results import EXAMINED, read_samples
from examples.dual_nature.study import CONFIG, study
from examples.dual_nature.target import MARKED, PLAIN, solve_power, solve_target, trap_margin
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console

SMALL = Plan(
    arms=(
        Arm("objectives", "la_tb", "g2", 3, 2, num_seeds=2),
        Arm("objectives", "rl_traj", "g2", 2, 2, ("objective.preset=rl_traj", "objective.log_z=null"), num_seeds=1),
    ),
    measured=(Measured(("objectives",), "base_T0.25", "g2", 0.25),),
    num_watched=3,
    watched_responses=2,
    num_examined=8,
    examined_responses=4,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder of bases whose g2 has learnt for 60 steps instead of 2,200."""
    bases, recipe = tmp_path_factory.mktemp("study") / "bases", RECIPES["g2"]
    RECIPES["g2"] = replace(recipe, num_steps=60, warmup_steps=10)
    try:
        return make_base("g2", bases)
    finally:
        RECIPES["g2"] = recipe


@pytest.mark.long
def test_the_study_leaves_runs_tables_and_reports_and_finds_them_again(base):
    out = base.parent.parent
    study(out, ["objectives"], 1, make_console(io.StringIO()), SMALL)
    results = json.loads((out / "results_objectives.json").read_text())
    assert {name: len(seeds) for name, seeds in results["examined"].items()} == {
        "base_T0.25": 1,
        "la_tb": 2,
        "rl_traj": 1,
    }
    assert [course["steps"] for course in results["course"]["la_tb"]] == [3, 3]
    table = (out / "results_objectives.md").read_text()
    assert "| p* of g2, alpha 4 | exact |" in table
    assert "| p^4 of g2 | exact |" in table
    page = (out / "report" / "objectives" / "index.html").read_text()
    assert "la_tb" in page
    assert "rl_traj" in page

    evaluation = out / "la_tb_s1" / "evaluation"
    samples = read_samples(evaluation)
    assert len(samples) == 8
    assert [group[0].question for group in samples] == corpus.split_questions(0)[1][:8]
    assert describe(samples)["accuracy"] == pytest.approx(
        json.loads((evaluation / "evaluation.json").read_text())["all"]["avg"], abs=1e-12
    )

    before = {path: path.stat().st_mtime_ns for path in out.glob("*_s*/metrics.jsonl")}
    assert len(before) == 3
    study(out, ["objectives"], 1, make_console(io.StringIO()), SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*_s*/metrics.jsonl")}


@pytest.mark.parametrize("group", GROUPS)
def test_every_arm_is_a_config_that_training_accepts(group):
    for arm in Plan().of_group(group).arms:
        config = load_config(CONFIG, arm.overrides)
        assert config.objective.alpha == arm.alpha
        assert config.objective.tilt_cap == arm.tilt_cap
        assert config.rollout.max_response_tokens == arm.limit
    assert len({arm.name for arm in ARMS}) == len(ARMS)


def test_a_tilt_cap_takes_the_loop_out_of_the_exact_target_and_leaves_its_answers():
    """G2: p* is the loop; capped at 20 tokens it is what p* is where there is no loop to fall into."""
    safe = solve_target(PLAIN, corpus.G3, 4.0)
    trapped, capped = (solve_target(PLAIN, corpus.G2, 4.0, tilt_cap=cap) for cap in (None, 20))
    assert trapped.filler_share > 0.99 > 0.01 > capped.filler_share
    assert capped.accuracy == pytest.approx(safe.accuracy, abs=0.005)
    assert capped.mean_tokens == pytest.approx(safe.mean_tokens, abs=0.2)
    assert trap_margin(corpus.G2, 4.0) > 0 > trap_margin(corpus.G2, 4.0, tilt_cap=20)


@pytest.mark.parametrize("question", [PLAIN, MARKED], ids=["plain", "minus"])
def test_a_tilt_cap_of_one_token_is_no_tilt_and_of_all_tokens_the_whole_one(question):
    """Every response has at least one token, so a cap of 1 only normalises."""
    one, power = solve_target(question, corpus.G2, 2.0, tilt_cap=1), solve_power(question, corpus.G2, 2.0)
    whole, p_star = solve_target(question, corpus.G2, 2.0, tilt_cap=40), solve_target(question, corpus.G2, 2.0)
    for ours, theirs in ((one, power), (whole, p_star)):
        assert ours.accuracy == pytest.approx(theirs.accuracy, rel=1e-9)
        assert ours.mean_tokens == pytest.approx(theirs.mean_tokens, rel=1e-9)
        assert ours.entropy == pytest.approx(theirs.entropy, rel=1e-6)


def test_the_columns_are_figures_that_are_measured():
    question = corpus.split_questions(0)[1][0]
    direct = (v.BOX, v.number_token(question.gold), v.CLOSE, v.EOS)
    figures = describe([[Sample(question, direct, -2.0)] * 64])
    assert {name for name, _ in EXAMINED.values()} <= figures.keys()
    assert (figures["accuracy"], figures["direct"], figures["mean_tokens"], figures["entropy"]) == (1.0, 1.0, 4.0, 2.0)
