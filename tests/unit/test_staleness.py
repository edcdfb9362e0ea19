"""Whose rollouts are replayed, and what `check` says of the weight."""

from __future__ import annotations

import math

import pytest

from megatron_powerflow.config_file import dump_config, parse_config
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.training.inputs import Inputs
from megatron_powerflow.training.staleness import (
    SampledBy,
    is_own_run,
    lag_of,
    objective_of,
    temperature_lines,
    weight_lines,
    who_sampled,
)
from tests.unit.test_config import MINIMAL


@pytest.fixture
def saved(tmp_path):
    """RUN/rollouts of a run with the smallest config."""
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "config.yaml").write_text(dump_config(parse_config(MINIMAL, ["rollout.save=true"])))
    return tmp_path / "rollouts"


def replaying(saved, *overrides: str):
    return parse_config(MINIMAL, [f"rollout.replay={saved}", *overrides])


@pytest.mark.parametrize(
    "overrides", [[], ["parallel.pp=2"], ["run.num_steps=7"], ["objective.ratio=seq_mean"], ["model.reference=swap"]]
)
def test_the_same_training_is_the_same_policy(saved, overrides):
    config = replaying(saved, *overrides)
    assert is_own_run(config, saved)
    assert objective_of(config, SampledBy.OWN).ratio == "none"


@pytest.mark.parametrize(
    "override",
    [
        *("model.hf_path=other", "objective.alpha=2", "optimizer.lr=1e-5", "run.seed=1", "precision.dtype=fp32"),
        *("optimizer.updates_per_rollout=2", "objective.psi=-0.5"),
    ],
)
def test_another_training_is_another_policy(saved, override):
    config = replaying(saved, override)
    assert not is_own_run(config, saved)
    assert objective_of(config, SampledBy.SAVED).ratio == "seq"


def test_another_commit_of_the_model_is_another_policy_and_of_the_prompts_is_not(saved):
    before = Inputs("2026-11-26", {}, {}, revisions={"owner/tiny": "1" * 40, "datasets/owner/questions": "1" * 40})
    before.write(saved.parent)
    config, moved = replaying(saved), {"datasets/owner/questions": "2" * 40}
    assert is_own_run(config, saved, revisions=before.revisions | moved)
    assert not is_own_run(config, saved, revisions=before.revisions | {"owner/tiny": "2" * 40})


def test_rollouts_without_a_config_are_another_policys(saved):
    (saved.parent / "config.yaml").write_text("objective: [")
    assert not is_own_run(replaying(saved), saved)
    (saved.parent / "config.yaml").unlink()
    assert not is_own_run(replaying(saved), saved)


def test_check_says_what_becomes_of_the_weight(saved):
    """One line, of w, where v is 1 and nothing is lost by that."""
    (line,) = weight_lines(parse_config(MINIMAL), SampledBy.OWN)
    assert line == "weight    w = 1: each update is of rollouts by the policy that it trains"
    assert weight_lines(replaying(saved), SampledBy.OWN) == [line]
    (line,) = weight_lines(replaying(saved), SampledBy.SAVED)
    assert "ratio seq, clipped to 1 +- 0.2, S_old of the saved log-probs: the replayed rollouts are another" in line
    (line,) = weight_lines(parse_config(MINIMAL, ["optimizer.updates_per_rollout=2"]), SampledBy.OWN)
    assert "S_old scored before the first update: the later updates of a step are of rollouts by the policy" in line
    for overrides, sampled_by in (
        (["optimizer.updates_per_rollout=2"], SampledBy.OWN),
        ([f"rollout.replay={saved}"], SampledBy.SAVED),
        (["optimizer.updates_per_rollout=2"], SampledBy.OLDER),
    ):
        config = parse_config(MINIMAL, [*overrides, "objective.ratio=none"])
        assert "w is DROPPED" in weight_lines(config, sampled_by)[0]


@pytest.mark.parametrize(
    ("overrides", "sampled_by", "w", "v"),
    [
        (
            ["sampler_ratio=seq"],
            SampledBy.OWN,
            "w = 1: each update",
            "v = min(exp(S_old - S_sampler), 2), S_old scored",
        ),
        (["sampler_ratio=seq"], SampledBy.OWN, "w = 1", ": sampler and trainer have the same weights"),
        (["sampler_ratio=seq_mean", "sampler_ratio_cap=3"], SampledBy.OLDER, "w = 1: S_old", "S_sampler) / n), 3)"),
        (["sampler_ratio=seq"], SampledBy.OLDER, "its one update", ": the rollouts are by older weights of this run"),
        (["sampler_ratio=seq"], SampledBy.ANOTHER, "w = 1: S_old", ": the replayed rollouts are another policy's"),
        (["preset=grpo", "sampler_ratio=token"], SampledBy.OWN, "w = 1", "min(p_old / p_sampler of each token, 2)"),
        ([], SampledBy.OLDER, "w = 1: S_old", "v is 1: the optimum is the same, whoever sampled"),
        (["preset=grpo"], SampledBy.OLDER, "w = 1: S_old", "set objective.sampler_ratio=token"),
        (["preset=rl_traj"], SampledBy.OLDER, "w = 1: S_old", "v is 1: the optimum is the same"),
        (["preset=tb_token_step"], SampledBy.OLDER, "w = 1: S_old", "set objective.sampler_ratio=seq"),
        (["preset=one_shot_em"], SampledBy.OLDER, "w = 1: S_old", "v does not exist"),
    ],
)
def test_check_says_what_v_is(overrides, sampled_by, w, v):
    first, second = weight_lines(parse_config(MINIMAL, [f"objective.{item}" for item in overrides]), sampled_by)
    assert first.startswith(f"weight    {w}") or w in first
    assert second.startswith("          v ")
    assert v in second


def test_w_of_a_later_update_is_of_the_trainer_at_the_start_whoever_sampled():
    overrides = ["optimizer.updates_per_rollout=2", "objective.sampler_ratio=seq"]
    for sampled_by in (SampledBy.OLDER, SampledBy.ANOTHER):
        first = weight_lines(parse_config(MINIMAL, overrides), sampled_by)[0]
        assert "S_old scored before the first update: the later updates of a step find other weights" in first


def test_who_is_old_in_a_replay_is_chosen_by_the_sampler_ratio(saved):
    """ "Bypass" and "decoupled" in the words of others: without it w leads from the sampler to the policy at once."""
    assert who_sampled(parse_config(MINIMAL), own=True) is SampledBy.OWN
    assert who_sampled(replaying(saved), own=False) is SampledBy.SAVED
    apart = replaying(saved, "objective.sampler_ratio=seq")
    assert who_sampled(apart, own=False) is SampledBy.ANOTHER
    assert [who.old_is_scored for who in SampledBy] == [True, True, True, False]
    assert (apart.objective.ratio, apart.objective.sampler_ratio_cap) == ("none", 2.0)
    assert not is_own_run(apart, saved)  # it trains otherwise than the run that saved them
    (saved.parent / "config.yaml").write_text(dump_config(parse_config(MINIMAL, ["objective.sampler_ratio=seq"])))
    assert is_own_run(apart, saved)


def rollout(*weight_versions: tuple[int, int, int]) -> Rollout:
    return Rollout(Prompt("p", 0, (1,)), 0, 0, (5,) * 6, (-1.0,) * 6, "eos", weight_versions)


def test_the_lag_of_a_response_by_hand():
    """At step 9: two tokens by step 6's weights, one by step 8's, three by its own: 2 x 3 + 1."""
    assert lag_of(rollout((6, 0, 2), (8, 2, 3), (9, 3, 6)), 9, SampledBy.OLDER) == (7.0, 3.0, 3)
    assert lag_of(rollout((8, 0, 6)), 9, SampledBy.OLDER) == (6.0, 1.0, 1)
    assert lag_of(rollout((8, 0, 2), (8, 2, 6)), 9, SampledBy.OLDER) == (6.0, 1.0, 1)  # one version in two spans
    for sampled_by in (SampledBy.OWN, SampledBy.OLDER):
        assert lag_of(rollout(), 9, sampled_by) == (0.0, 0.0, 1)
    assert lag_of(rollout((9, 0, 6)), 9, SampledBy.OWN) == (0.0, 0.0, 1)


def test_the_versions_of_another_run_are_no_lag():
    for sampled_by in (SampledBy.ANOTHER, SampledBy.SAVED):
        for versions in ((), ((3, 0, 6),)):
            assert lag_of(rollout(*versions), 9, sampled_by) == pytest.approx((math.nan,) * 3, nan_ok=True)


def test_weights_that_the_plan_does_not_know_of_are_a_fault():
    with pytest.raises(AssertionError, match="older weights"):
        lag_of(rollout((8, 0, 6)), 9, SampledBy.OWN)
    with pytest.raises(AssertionError, match="later step"):
        lag_of(rollout((10, 0, 6)), 9, SampledBy.OLDER)


def test_check_says_what_a_temperature_means():
    assert temperature_lines(parse_config(MINIMAL)) == []
    said = " ".join(temperature_lines(parse_config(MINIMAL, ["rollout.temperature=0.7"])))
    assert "softmax(logits / 0.7)" in said
    assert "must be served at temperature 0.7" in said
