"""What is made of whole groups, by hand: estimates of log Z', and advantages, over the micro-batches of an update.

Four responses in two groups, three in the first micro-batch: those of `test_loss.py` without a reward, and a fourth
of one token with S = -1, S_ref = -4. At alpha 2 (S - 2 S_ref)/n - 2 psi = 0, 4 | 3, 7.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_powerflow.objective.objective import (
    BalanceObjective,
    EntropyObjective,
    ImportanceRule,
    PolicyGradientObjective,
    SamplerRule,
)
from megatron_powerflow.objective.presets import PRESETS, LogZ
from megatron_powerflow.records import EstimatedBatch, RewardedBatch
from megatron_powerflow.training import group_baseline
from megatron_powerflow.training.group_baseline import with_group_baseline, with_log_z
from tests.batches import rows, scored_batch
from tests.unit.test_loss import POLICY, REF

CURRENT = [rows(POLICY), rows([(-1,)])]
NO_WEIGHT = ImportanceRule("none")


def two(first: dict | None = None, second: dict | None = None, **both):
    one = {"psi": [0.0, -0.5, 0.0], "group": torch.tensor([0, 0, 3])} | both | (first or {})
    other = {"group": torch.tensor([3]), "rollout_index": torch.tensor([3])} | both | (second or {})
    return [scored_batch(REF, **one), scored_batch([(-4,)], **other)]


def objective(log_z: LogZ, preset: str = "la_tb", rule: ImportanceRule = NO_WEIGHT, **changes):
    return BalanceObjective(PRESETS[preset], 2.0, log_z, rule, **changes)


def estimates(which: BalanceObjective, batches=None) -> tuple[list[float], list[float]]:
    found = with_log_z(batches or two(), CURRENT, which)
    assert all(isinstance(batch, EstimatedBatch) for batch in found)
    assert not any(batch.log_z.requires_grad for batch in found)
    return [x for batch in found for x in batch.log_z.tolist()], [
        x for batch in found for x in batch.weight_factor.tolist()
    ]


def test_log_z_by_hand_where_groups_are_cut_by_micro_batches():
    assert estimates(objective("group")) == ([-2, -2, -5, -5], [1, 1, 1, 1])
    assert estimates(objective("loo")) == ([-4, 0, -7, -3], [1, 1, 1, 1])
    assert estimates(objective("contrastive")) == ([-2, -2, -5, -5], [2, 2, 2, 2])


def test_the_mean_is_weighted_by_the_clipped_weight():
    """S - S_old = 0, -1 | .1, 0 at epsilon .2: weights 1, .8 | e^.1, 1."""
    rule = ImportanceRule("seq", 0.2)
    batches = two({"old_log_probs": rows(((-1, -2, -3), (-1, -2), (-1.1,)))}, {"old_log_probs": rows([(-1,)])})
    w = math.exp(0.1)
    expected = -(0.8 * 4) / 1.8, -(3 * w + 7) / (w + 1)
    assert estimates(objective("group", rule=rule), batches)[0] == pytest.approx([expected[0]] * 2 + [expected[1]] * 2)
    assert estimates(objective("loo", rule=rule), batches)[0] == pytest.approx([-4, 0, -7, -3])


def test_the_mean_is_weighted_by_the_weight_of_the_sampler():
    """S - S_sampler = 0, log .5 | log 3, 0, a cap of 2: v = 1, .5 | 2, 1, with S of the pass that was made for it."""
    half, three = math.log(0.5), math.log(3)
    sampler = {"rollout_log_probs": rows(((-1, -2, -3), (-1, -3 - half), (-1 - three,)))}
    batches = two(sampler, {"rollout_log_probs": rows([(-1,)])})
    rule = SamplerRule("seq", 2.0)
    expected = -(0.5 * 4) / 1.5, -(2 * 3 + 7) / 3
    which = objective("group", sampler=rule)
    assert estimates(which, batches)[0] == pytest.approx([expected[0]] * 2 + [expected[1]] * 2)
    assert estimates(objective("loo", sampler=rule), batches)[0] == pytest.approx([-4, 0, -7, -3])
    assert estimates(objective("contrastive", sampler=rule), batches)[1] == pytest.approx([1.5, 1.5, 3, 3])


def test_the_mean_is_weighted_by_the_length_where_the_loss_is():
    """tb_token_score: m = 3, 2 | 1, 1. The contrastive factor is W / (G - 1) = 5 | 2."""
    assert estimates(objective("group", "tb_token_score"))[0] == pytest.approx([-8 / 5] * 2 + [-5] * 2)
    log_z, factor = estimates(objective("contrastive", "tb_token_score"))
    assert (log_z, factor) == (pytest.approx([-8 / 5] * 2 + [-5] * 2), [5, 5, 2, 2])


def test_dropped_responses_say_nothing_of_log_z():
    batches = two({"kept": [True, False, True]})
    assert estimates(objective("group"), batches)[0] == [0, 0, -5, -5]
    batches = two({"kept": [True, True, True]}, {"kept": [False]})
    assert estimates(objective("loo"), batches)[0][:3] == [-4, 0, -3]  # alone: residual 0
    assert estimates(objective("contrastive"), batches)[1][:3] == [2, 2, 1]


def test_dummies_alone_get_estimates_of_nothing():
    nobody = [replace(batch, **{name: getattr(batch, name)[:0] for name in ("group", "psi")}) for batch in two()]
    assert [len(batch.log_z) for batch in with_log_z(nobody, CURRENT, objective("group"))] == [0, 0]


SCORER = SimpleNamespace(groups=SimpleNamespace(is_last_stage=True))


@pytest.fixture
def scored(monkeypatch):
    """The policy's forward pass, and how often it was asked for."""
    calls = []
    monkeypatch.setattr(group_baseline, "score", lambda *arguments: calls.append(1) or CURRENT)
    return calls


def test_a_forward_pass_is_made_where_a_group_is_cut_and_only_there(scored):
    batches = [replace(batch, whole_groups=True) for batch in two()]
    for which in (objective("mlp"), objective("group"), EntropyObjective()):
        assert with_group_baseline((), batches, SCORER, which) == batches
    assert not scored
    cut = [batches[0], replace(batches[1], whole_groups=False)]
    found = with_group_baseline((), cut, SCORER, objective("group"))
    assert scored
    assert [batch.log_z.tolist() for batch in found] == [[-2, -2, -5], [-5]]
    assert with_group_baseline((), cut, SCORER, objective("scalar")) == cut


def rewarded(preset: str, alpha: float | None, batches=None) -> list[RewardedBatch]:
    which = PolicyGradientObjective(PRESETS[preset], alpha, NO_WEIGHT)
    found = with_group_baseline((), batches or two(), SCORER, which)
    assert all(isinstance(batch, RewardedBatch) for batch in found)
    return found


def of(batches, name: str) -> list[float]:
    return [x for batch in batches for x in getattr(batch, name).tolist()]


@pytest.mark.parametrize(
    ("preset", "reward", "advantage"),
    [("rl_traj", [0, -7, -3, -7], [3.5, -3.5, 2, -2]), ("rl_token", [0, -4, -3, -7], [2, -2, 2, -2])],
)
def test_the_reward_of_the_power_by_hand(scored, preset, reward, advantage):
    """2 S_ref - S + 2 psi = 0, -6 - 1, -3, -7; over n: 0, -3 - 1, -3, -7. The sampler's log-probs do not enter."""
    found = rewarded(preset, 2.0, two(rollout_log_probs=torch.full((3, 5), -9.0)))
    assert of(found, "reward") == pytest.approx(reward)
    assert of(found, "advantage") == pytest.approx(advantage)


def test_the_rewards_of_text_are_centred_and_scaled_in_their_group(scored):
    """Rewards 1, 0 | 3, 1: means .5 and 2, deviations with G - 1 .7071 and 1.4142."""
    found = rewarded("grpo", None, two({"reward": [1.0, 0.0, 3.0]}, {"reward": [1.0]}))
    assert of(found, "reward") == [1, 0, 3, 1]
    half = math.sqrt(0.5)
    assert of(found, "advantage") == pytest.approx([half, -half, half, -half], rel=1e-5)
    assert not scored


def test_dropped_responses_have_no_advantage_and_no_part_in_the_others():
    batches = two({"reward": [1.0, 5.0, 3.0], "kept": [True, False, True]}, {"reward": [1.0]})
    half = math.sqrt(0.5)
    assert of(rewarded("grpo", None, batches), "advantage") == pytest.approx([0, 0, half, -half], rel=1e-5)
