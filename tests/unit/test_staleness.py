"""Whose rollouts are replayed, and what `check` says of the weight."""

from __future__ import annotations

import pytest

from megatron_powerflow.config_file import dump_config, parse_config
from megatron_powerflow.training.inputs import Inputs
from megatron_powerflow.training.staleness import is_own_run, objective_of, temperature_lines, weight_line
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
    assert objective_of(config, True).ratio == "none"


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
    assert objective_of(config, False).ratio == "seq"


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
    assert "w = 1" in weight_line(parse_config(MINIMAL), True)
    assert "w = 1" in weight_line(replaying(saved), True)
    assert "ratio seq, clipped to 1 +- 0.2" in weight_line(replaying(saved), False)
    for overrides, on_policy in ((["optimizer.updates_per_rollout=2"], True), ([f"rollout.replay={saved}"], False)):
        config = parse_config(MINIMAL, [*overrides, "objective.ratio=none"])
        assert "DROPPED" in weight_line(config, on_policy)


def test_check_says_what_a_temperature_means():
    assert temperature_lines(parse_config(MINIMAL)) == []
    said = " ".join(temperature_lines(parse_config(MINIMAL, ["rollout.temperature=0.7"])))
    assert "softmax(logits / 0.7)" in said
    assert "must be served at temperature 0.7" in said
