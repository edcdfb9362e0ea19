"""The loss of a micro-batch by hand, in every form: values, gradients, and the columns that metrics are made of.

Three responses of 3, 2 and 1 tokens. By the policy (-1 -2 -3), (-1 -3), (-1): S = -6, -4, -1. By the reference
(-1 -1 -1), (-2 -3), (-2): S_ref = -3, -5, -2. psi = 0, -.5, 0; the task's reward 1, 0, 0. At alpha 2

    (S - 2 S_ref)/n - 2 psi - r     0 - 0 - 1, 3 + 1, 3      = -1, 4, 3
    S - 2 S_ref - 2 psi - r         0 - 0 - 1, 6 + 1, 3      = -1, 7, 3
    S - 2 S_ref/n - 2 psi - r       -4 - 1, 1 + 1, 3         = -5, 2, 3
    log pi - 2 log p, by token      (1 0 -1), (3 3), (3)     variance 2/3, 0, 0

The step has four kept rollouts, the fourth of them elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_powerflow.log_probs.token_log_probs import TokenStatistics
from megatron_powerflow.objective.objective import (
    BalanceObjective,
    EntropyObjective,
    ImportanceRule,
    PolicyGradientObjective,
    SamplerRule,
)
from megatron_powerflow.objective.presets import PRESETS, LogZ
from megatron_powerflow.records import ROLLOUT_COLUMNS, EstimatedBatch, RewardedBatch
from megatron_powerflow.training.loss import (
    LOOP_COLUMNS,
    balance,
    common_columns,
    entropy_minimum,
    micro_batch_loss,
    policy_gradient,
    with_loops,
)
from tests.batches import as_kind, rows, scored_batch

POLICY = ((-1, -2, -3), (-1, -3), (-1,))
REF = ((-1, -1, -1), (-2, -3), (-2,))
NUM_KEPT = 4
NO_WEIGHT = ImportanceRule("none")
LOG_Z = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)


def example(**fields):
    return scored_batch(REF, **{"psi": [0.0, -0.5, 0.0], "reward": [1.0, 0.0, 0.0]} | fields)


def objective(preset: str = "la_tb", log_z: LogZ = "mlp", rule: ImportanceRule = NO_WEIGHT, **changes):
    return BalanceObjective(PRESETS[preset], 2.0, log_z, rule, **changes)


def of_responses(gradient: torch.Tensor, batch) -> list[list[float]]:
    return [row[mask].tolist() for row, mask in zip(gradient, batch.loss_mask, strict=True)]


def each(values) -> list[list[float]]:
    return [pytest.approx(row) for row in values]


@pytest.mark.parametrize(
    ("preset", "terms", "gradient"),
    [
        ("la_tb", [4, 9, 4], [[-1 / 3] * 3, [0.75] * 2, [1]]),
        ("tb_traj", [4, 36, 4], [[-1] * 3, [3] * 2, [1]]),
        ("tb_token_target", [36, 1, 4], [[-3] * 3, [0.5] * 2, [1]]),
        ("tb_token_score", [3 * 4, 2 * 9, 4], [[-1] * 3, [1.5] * 2, [1]]),
        ("tb_token_step", [4 + 2 / 3, 9, 4], [[-1 / 6, -1 / 3, -1 / 2], [0.75] * 2, [1]]),
        ("flow_rl", [4, 9, 4], [[-1 / 3] * 3, [0.75] * 2, [1]]),
    ],
)
def test_the_balance_of_each_preset_by_hand(preset, terms, gradient):
    """Terms m (delta^2 + spread); gradient of a token 2 m delta / (a B), of tb_token_step 2 (log Z' + x_t) / (n B)."""
    batch, log_probs, log_z = example(), rows(POLICY).requires_grad_(), LOG_Z.clone().requires_grad_()
    loss, columns = balance(log_probs, log_z, ONES, batch, objective(preset), NUM_KEPT)
    assert columns["loss_term"].tolist() == pytest.approx(terms)
    assert float(loss) == pytest.approx(sum(terms) / 4)
    loss.backward()
    assert of_responses(log_probs.grad, batch) == each(gradient)
    assert "clipped" not in columns
    if preset == "la_tb":
        assert columns["residual"].tolist() == [-2, 3, 2]
        assert log_z.grad.tolist() == pytest.approx([-1, 1.5, 1])
        assert columns["weight"].tolist() == columns["ratio"].tolist() == [1, 1, 1]


def test_a_dropped_response_has_no_term_and_no_gradient():
    batch, log_probs = example(kept=[True, False, True]), rows(POLICY).requires_grad_()
    loss, columns = balance(log_probs, LOG_Z, ONES, batch, objective("tb_token_step"), 2)
    assert columns["loss_term"].tolist() == pytest.approx([4 + 2 / 3, 0, 4])
    assert float(loss) == pytest.approx((8 + 2 / 3) / 2)
    loss.backward()
    assert (log_probs.grad[1] == 0).all()


def test_a_tilt_cap_bounds_the_length_that_divides():
    """Cap 1: (S - 2 S_ref) - 2 psi - r, whatever n."""
    columns = balance(rows(POLICY), LOG_Z, ONES, example(), objective(tilt_cap=1), NUM_KEPT)[1]
    assert columns["residual"].tolist() == [-2, 6, 2]
    columns = balance(rows(POLICY), LOG_Z, ONES, example(), objective(tilt_cap=3), NUM_KEPT)[1]
    assert columns["residual"].tolist() == [-2, 3, 2]


OLD = ((-1, -2, -3.1), (-1, -2), (-1,))  # S - S_old = .1, -1, 0


@pytest.mark.parametrize(
    ("rule", "ratio", "weight"),
    [
        (ImportanceRule("seq", 0.3), [math.exp(0.1), math.exp(-1), 1], [math.exp(0.1), 0.7, 1]),
        (ImportanceRule("seq", 0.05), [math.exp(0.1), math.exp(-1), 1], [1.05, 0.95, 1]),
        (ImportanceRule("seq", 0.05, True), [math.exp(0.1), math.exp(-1), 1], [1.05, math.exp(-1), 1]),
        (ImportanceRule("seq_mean", 0.3), [math.exp(0.1 / 3), math.exp(-0.5), 1], [math.exp(0.1 / 3), 0.7, 1]),
        (NO_WEIGHT, [1, 1, 1], [1, 1, 1]),
    ],
)
def test_the_importance_weight_is_of_the_scored_old_policy(rule, ratio, weight):
    """Not of the sampler, whose log-probs are others; no gradient goes through it."""
    batch = example(old_log_probs=rows(OLD), rollout_log_probs=rows(((-9, -9, -9), (-9, -9), (-9,))))
    log_probs = rows(POLICY).requires_grad_()
    loss, columns = balance(log_probs, LOG_Z, ONES, batch, objective(rule=rule), NUM_KEPT)
    assert columns["ratio"].tolist() == pytest.approx(ratio)
    assert columns["weight"].tolist() == pytest.approx(weight)
    assert columns["loss_term"].tolist() == pytest.approx([4 * weight[0], 9 * weight[1], 4 * weight[2]])
    if rule.ratio != "none":
        assert columns["clipped"].tolist() == [float(w != r) for w, r in zip(weight, ratio, strict=True)]
    loss.backward()
    expected = [[-weight[0] / 3] * 3, [0.75 * weight[1]] * 2, [weight[2]]]
    assert of_responses(log_probs.grad, batch) == each(expected)


def test_the_per_token_part_weighs_as_the_rest_does():
    rule = ImportanceRule("seq", 0.05)
    batch = example(old_log_probs=rows(OLD))
    columns = balance(rows(POLICY), LOG_Z, ONES, batch, objective("tb_token_step", rule=rule), NUM_KEPT)[1]
    assert columns["loss_term"].tolist() == pytest.approx([1.05 * (4 + 2 / 3), 0.95 * 9, 4])


def test_the_contrastive_factor_multiplies_the_weight():
    factor = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    columns = balance(rows(POLICY), LOG_Z, factor, example(), objective("tb_token_score"), NUM_KEPT)[1]
    assert columns["weight"].tolist() == [3, 4, 3]
    assert columns["loss_term"].tolist() == [12, 36, 12]


def rewarded(**fields):
    return example(kind=RewardedBatch, advantage=torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), **fields)


def rival(preset: str = "grpo", rule: ImportanceRule = NO_WEIGHT, kl_coefficient: float = 0.0):
    return PolicyGradientObjective(PRESETS[preset], None, rule, kl_coefficient)


@pytest.mark.parametrize(
    ("preset", "terms", "gradient"),
    [
        ("grpo", [2, -4, 0.5], [[-1 / 12] * 3, [0.25] * 2, [-0.125]]),
        ("rl_traj", [6, -8, 0.5], [[-0.25] * 3, [0.5] * 2, [-0.125]]),
        ("rl_token", [6, -8, 0.5], [[-0.25] * 3, [0.5] * 2, [-0.125]]),
    ],
)
def test_the_policy_gradient_by_hand(preset, terms, gradient):
    """-A S / a with A = 1, -2, .5, and the gradient -A / (a B)."""
    batch, log_probs = rewarded(), rows(POLICY).requires_grad_()
    loss, columns = policy_gradient(log_probs, batch, rival(preset), NUM_KEPT)
    assert columns["loss_term"].tolist() == pytest.approx(terms)
    assert float(loss) == pytest.approx(sum(terms) / 4)
    loss.backward()
    assert of_responses(log_probs.grad, batch) == each(gradient)
    assert columns["advantage"].tolist() == [1, -2, 0.5]
    assert columns["weight"].tolist() == [1, 1, 1]
    assert "clipped" not in columns


@pytest.mark.parametrize("ratio", ["seq", "seq_mean", "token"])
def test_the_first_update_has_ratio_1_and_a_gradient(ratio):
    """The old policy is the current one, its log-probs without gradient. Value: -A n / a for seq_mean and token."""
    batch, log_probs = rewarded(), rows(POLICY).requires_grad_()
    loss, columns = policy_gradient(log_probs, batch, rival(rule=ImportanceRule(ratio, 0.2)), NUM_KEPT)
    expected = [-1 / 3, 2 / 2, -0.5] if ratio == "seq" else [-1, 2, -0.5]
    assert columns["loss_term"].tolist() == pytest.approx(expected)
    assert columns["ratio"].tolist() == [1, 1, 1]
    assert columns["clipped"].tolist() == [0, 0, 0]
    loss.backward()
    assert of_responses(log_probs.grad, batch) == each([[-1 / 12] * 3, [0.25] * 2, [-0.125]])


def test_a_later_update_is_clipped_as_the_config_says():
    """Sequence ratios e^.1, e^-1, 1; A = 1, -2, .5. At .05: min(e^.1, 1.05) 1, max(e^-1, .95) 2."""
    batch = rewarded(old_log_probs=rows(OLD))
    for upper_only, second in ((False, 0.95), (True, math.exp(-1))):
        rule = ImportanceRule("seq", 0.05, upper_only)
        columns = policy_gradient(rows(POLICY), batch, rival("rl_traj", rule), NUM_KEPT)[1]
        assert columns["loss_term"].tolist() == pytest.approx([-1.05, 2 * second, -0.5])
        assert columns["clipped"].tolist() == [1, not upper_only, 0]
    rule = ImportanceRule("token", 0.05)
    columns = policy_gradient(rows(POLICY), batch, rival(rule=rule), NUM_KEPT)[1]
    assert columns["loss_term"].tolist() == pytest.approx([-3.05 / 3, 2 * 1.95 / 2, -0.5])
    assert columns["clipped"].tolist() == pytest.approx([1 / 3, 1 / 2, 0])


# exp(d) - d - 1 of d = log p - log pi: (0 1 2), (-1 0), (-1), and their means
KL = [(math.e - 2 + math.e**2 - 3) / 3, math.exp(-1) / 2, math.exp(-1)]


def test_the_kl_term_of_rivals_by_hand():
    loss, columns = policy_gradient(rows(POLICY), rewarded(), rival(kl_coefficient=0.5), NUM_KEPT)
    expected = [2 + KL[0] / 2, -4 + KL[1] / 2, 0.5 + KL[2] / 2]
    assert columns["loss_term"].tolist() == pytest.approx(expected)
    assert float(loss) == pytest.approx(sum(expected) / 4)


def test_dropped_responses_are_not_in_the_loss_of_a_rival():
    log_probs = rows(POLICY).requires_grad_()
    batch = rewarded(kept=[True, False, True])
    loss, columns = policy_gradient(log_probs, batch, rival(kl_coefficient=0.5), 2)
    assert columns["loss_term"].tolist() == pytest.approx([2 + KL[0] / 2, 0, 0.5 + KL[2] / 2])
    assert float(loss) == pytest.approx(sum(columns["loss_term"].tolist()) / 2)
    loss.backward()
    assert (log_probs.grad[1] == 0).all()


ENTROPY = ((0.3, 0.6, 0.9), (1.0, 2.0), (0.7,))


def test_one_shot_em_minimises_the_mean_entropy_of_a_response():
    batch, entropy = example(), rows(ENTROPY).requires_grad_()
    loss, columns = entropy_minimum(rows(POLICY), entropy, batch, EntropyObjective(), NUM_KEPT)
    assert columns["loss_term"].tolist() == pytest.approx([0.6, 1.5, 0.7])
    assert float(loss) == pytest.approx(2.8 / 4)
    loss.backward()
    assert of_responses(entropy.grad, batch) == each([[1 / 12] * 3, [1 / 8] * 2, [1 / 4]])
    loss, columns = entropy_minimum(rows(POLICY), rows(ENTROPY), batch, EntropyObjective(2.0), NUM_KEPT)
    assert columns["loss_term"].tolist() == pytest.approx([0.6 + 2 * KL[0], 1.5 + 2 * KL[1], 0.7 + 2 * KL[2]])


SAMPLER = ((-1, -2, -3.3), (-1, -2.5), (-2,))


def test_the_columns_of_a_rollout_by_hand():
    """S_old - S_sampler by token: (0 0 .2), (0 .5), (1): sampler against scorer, whatever training did since."""
    batch = example(
        old_log_probs=rows(OLD),
        rollout_log_probs=rows(SAMPLER),
        truncated=[False, True, False],
        kept=[True, False, True],
        rollout_index=[4, 5, 6],
        annotations=[[1.0, 0.0, 0.1, 0.2, 0.3]] * 3,
    )
    found = {name: values.tolist() for name, values in common_columns(rows(POLICY), batch).items()}
    expected = {
        "rollout_index": [4, 5, 6],
        "num_prompt_tokens": [2, 2, 2],
        "num_response_tokens": [3, 2, 1],
        "sequence_log_prob": [-6, -4, -1],
        "old_sequence_log_prob": [-6.1, -3, -1],
        "ref_sequence_log_prob": [-3, -5, -2],
        "rollout_sequence_log_prob": [-6.3, -3.5, -2],
        "psi": [0, -0.5, 0],
        "reward": [1, 0, 0],
        "kept": [1, 0, 1],
        "truncated": [0, 1, 0],
        "sampler_gap_sum": [0.2, 0.5, 1],
        "sampler_gap_max": [0.2, 0.5, 1],
        "sampler_gap_kl_sum": [math.exp(0.2) - 1.2, math.exp(0.5) - 1.5, math.e - 2],
        "token_ratio_sum": [2 + math.exp(0.2), 1 + math.exp(0.5), math.exp(1)],
        **dict.fromkeys(("staleness_sum", "staleness_max", "staleness_kl_sum"), [math.nan] * 3),
        "lag_sum": [0, 0, 0],
        "lag_max": [0, 0, 0],
        "num_versions": [1, 1, 1],
        "max_log_prob": [-1, -1, -1],
        "boxed": [1, 1, 1],
        "correct": [0, 0, 0],
        "repeated_share": [0.1] * 3,
        "distinct_2": [0.2] * 3,
        "distinct_3": [0.3] * 3,
    }
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, nan_ok=True), name


def test_on_policy_the_old_log_probs_are_those_of_this_pass():
    columns = common_columns(rows(POLICY), example(rollout_log_probs=rows(SAMPLER)))
    assert columns["old_sequence_log_prob"].tolist() == [-6, -4, -1]
    assert columns["sampler_gap_sum"].tolist() == pytest.approx([0.3, 0.5, 1])


def test_the_sampler_of_another_run_has_no_gap():
    batch = example(old_log_probs=rows(SAMPLER), rollout_log_probs=rows(SAMPLER), old_from_sampler=True)
    columns = common_columns(rows(POLICY), batch)
    for name in (*GAPS, *STALENESS):
        assert columns[name].isnan().all()
    assert columns["old_sequence_log_prob"].tolist() == pytest.approx([-6.3, -3.5, -2])


GAPS = ("sampler_gap_sum", "sampler_gap_max", "sampler_gap_kl_sum", "token_ratio_sum")
STALENESS = ("staleness_sum", "staleness_max", "staleness_kl_sum")


def test_what_lies_between_other_weights_is_staleness_and_no_gap():
    """The second response has a token by older weights, the third is by another run's."""
    lag = [[0.0, 0.0, 1.0], [3.0, 3.0, 2.0], [math.nan] * 3]
    batch = example(old_log_probs=rows(OLD), rollout_log_probs=rows(SAMPLER), lag=lag)
    columns = {name: values.tolist() for name, values in common_columns(rows(POLICY), batch).items()}
    for name, value in zip(GAPS, (0.2, 0.2, math.exp(0.2) - 1.2, 2 + math.exp(0.2)), strict=True):
        assert columns[name] == pytest.approx([value, math.nan, math.nan], nan_ok=True), name
    assert columns["staleness_sum"] == pytest.approx([math.nan, 0.5, 1], nan_ok=True)
    assert columns["staleness_max"] == pytest.approx([math.nan, 0.5, 1], nan_ok=True)
    assert columns["staleness_kl_sum"] == pytest.approx([math.nan, math.exp(0.5) - 1.5, math.e - 2], nan_ok=True)
    assert columns["lag_sum"] == pytest.approx([0, 3, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("rule", "v", "truncated"),
    [
        (SamplerRule("seq", 2.0), [math.exp(0.2), math.exp(0.5), 2], [0, 0, 1]),
        (SamplerRule("seq", 1.5), [math.exp(0.2), 1.5, 1.5], [0, 1, 1]),
        (SamplerRule("seq_mean", 2.0), [math.exp(0.2 / 3), math.exp(0.25), 2], [0, 0, 1]),
    ],
)
def test_the_weight_of_the_sampler_multiplies_that_of_the_update(rule, v, truncated):
    """S_old - S_sampler = .2, .5, 1 and w = 1.05, .95, 1; no gradient goes through either."""
    batch = example(old_log_probs=rows(OLD), rollout_log_probs=rows(SAMPLER))
    log_probs = rows(POLICY).requires_grad_()
    which = objective(rule=ImportanceRule("seq", 0.05), sampler=rule)
    loss, columns = balance(log_probs, LOG_Z, 2 * ONES, batch, which, NUM_KEPT)
    whole = [a * b for a, b in zip(v, [1.05, 0.95, 1], strict=True)]
    assert columns["sampler_weight"].tolist() == pytest.approx(v)
    assert columns["sampler_truncated"].tolist() == truncated
    assert columns["importance"].tolist() == pytest.approx(whole)
    assert columns["weight"].tolist() == pytest.approx([2 * weight for weight in whole])
    assert columns["loss_term"].tolist() == pytest.approx([2 * whole[0] * 4, 2 * whole[1] * 9, 2 * whole[2] * 4])
    loss.backward()
    expected = [[-2 * whole[0] / 3] * 3, [2 * 0.75 * whole[1]] * 2, [2 * whole[2]]]
    assert of_responses(log_probs.grad, batch) == each(expected)


def test_of_one_update_the_trainer_at_the_start_is_this_very_pass():
    """S - S_sampler = .3, -.5, 1 with S detached: no other pass has scored it."""
    batch, log_probs = example(rollout_log_probs=rows(SAMPLER)), rows(POLICY).requires_grad_()
    loss, columns = balance(log_probs, LOG_Z, ONES, batch, objective(sampler=SamplerRule("seq", 2.0)), NUM_KEPT)
    v = [math.exp(0.3), math.exp(-0.5), 2]
    assert columns["sampler_weight"].tolist() == pytest.approx(v)
    assert columns["importance"].tolist() == pytest.approx(v)
    assert columns["ratio"].tolist() == [1, 1, 1]
    loss.backward()
    assert of_responses(log_probs.grad, batch) == each([[-v[0] / 3] * 3, [0.75 * v[1]] * 2, [v[2]]])


def test_of_saved_log_probs_the_weight_of_the_sampler_is_1():
    """Old and sampler are one there, and w says it all: the reason why a config that asks for v has S_old scored."""
    batch = example(old_log_probs=rows(SAMPLER), rollout_log_probs=rows(SAMPLER), old_from_sampler=True)
    columns = balance(rows(POLICY), LOG_Z, ONES, batch, objective(sampler=SamplerRule("seq", 2.0)), NUM_KEPT)[1]
    assert columns["sampler_weight"].tolist() == [1, 1, 1]


def test_the_groups_own_log_z_is_a_mean_under_the_weight_of_the_sampler():
    """v = e^.2, e^.5, 2 and s = -1, 4, 3, from the loss's own pass; contrastive: the factor is W / (G - 1)."""
    batch = example(old_log_probs=rows(OLD), rollout_log_probs=rows(SAMPLER), whole_groups=True)
    v, s = [math.exp(0.2), math.exp(0.5), 2.0], [-1, 4, 3]
    mean = sum(a * b for a, b in zip(v, s, strict=True)) / sum(v)
    rule = SamplerRule("seq", 2.0)
    _, columns = table_of(rows(POLICY), batch, objective(log_z="group", sampler=rule))
    assert columns["residual"] == pytest.approx([value - mean for value in s])
    assert sum(a * b for a, b in zip(columns["weight"], columns["residual"], strict=True)) == pytest.approx(0)
    _, columns = table_of(rows(POLICY), batch, objective(log_z="contrastive", sampler=rule))
    assert columns["weight"] == pytest.approx([value * sum(v) / 2 for value in v])


@pytest.mark.parametrize("ratio", ["none", "token"])
def test_a_rivals_tokens_have_weights_of_their_own(ratio):
    """v by token 1 1 e^.2 | 1 1.5 | 1.5 at a cap of 1.5; A = 1, -2, .5; at ratio 1 the gradient is -A v / (a B)."""
    old = rows(POLICY)
    sampler = rows(((-1, -2, -3.2), (-1, -3.5), (-2,)))
    batch = rewarded(old_log_probs=old, rollout_log_probs=sampler)
    which = PolicyGradientObjective(
        PRESETS["grpo"], None, ImportanceRule(ratio, 0.2), sampler=SamplerRule("token", 1.5)
    )
    log_probs = rows(POLICY).requires_grad_()
    loss, columns = policy_gradient(log_probs, batch, which, NUM_KEPT)
    loss.backward()
    v = [[1, 1, math.exp(0.2)], [1, 1.5], [1.5]]
    expected = [[-a * x / (n * 4) for x in row] for a, n, row in zip((1, -2, 0.5), (3, 2, 1), v, strict=True)]
    assert of_responses(log_probs.grad, batch) == each(expected)
    means = [(2 + math.exp(0.2)) / 3, 1.25, 1.5]
    assert columns["weight"].tolist() == columns["sampler_weight"].tolist() == pytest.approx(means)
    assert columns["importance"].tolist() == pytest.approx(means)
    assert columns["sampler_truncated"].tolist() == [0, 0.5, 1]


def test_the_weight_of_the_sampler_is_not_in_the_kl_term():
    rule = SamplerRule("seq", 2.0)
    which = PolicyGradientObjective(PRESETS["grpo"], None, NO_WEIGHT, 0.5, rule)
    batch = rewarded(old_log_probs=rows(OLD), rollout_log_probs=rows(SAMPLER))
    columns = policy_gradient(rows(POLICY), batch, which, NUM_KEPT)[1]
    v = [math.exp(0.2), math.exp(0.5), 2]
    expected = [2 * v[0] + KL[0] / 2, -4 * v[1] + KL[1] / 2, 0.5 * v[2] + KL[2] / 2]
    assert columns["loss_term"].tolist() == pytest.approx(expected)


def test_weights_that_a_config_does_not_have_are_no_columns():
    of_balance = balance(rows(POLICY), LOG_Z, ONES, example(), objective(), NUM_KEPT)[1]
    of_rival = policy_gradient(rows(POLICY), rewarded(), rival(), NUM_KEPT)[1]
    for columns in (of_balance, of_rival):
        assert not {"sampler_weight", "sampler_truncated", "importance"} & columns.keys()
    columns = balance(rows(POLICY), LOG_Z, ONES, example(), objective(rule=ImportanceRule("seq", 0.2)), NUM_KEPT)[1]
    assert columns["importance"].tolist() == [1, 1, 1]
    assert "sampler_weight" not in columns


def test_a_loop_is_sought_in_the_response_alone():
    """Prompt 7 7, response nine times 7, which cost the reference 5 nats once and .1 eight times."""
    batch = scored_batch(((-5.0, *[-0.1] * 8),))
    tokens = torch.full((1, 11), 7)
    batch = replace(batch, tokens=tokens, targets=torch.cat([tokens[:, 1:], torch.tensor([[7]])], dim=1))
    other = scored_batch(((-1.0, -2.0),))  # without one
    found = with_loops(torch.zeros(2, len(ROLLOUT_COLUMNS), dtype=torch.float64), [batch, other])
    columns = dict(zip(ROLLOUT_COLUMNS, found.T, strict=True))
    assert columns["loop_tokens"].tolist() == pytest.approx([9, math.nan], nan_ok=True)
    assert columns["loop_nats"].tolist() == pytest.approx([0.1, math.nan], nan_ok=True)
    assert columns["entry_nats"].tolist() == pytest.approx([4.9, math.nan], nan_ok=True)
    assert all((values == 0).all() for name, values in columns.items() if name not in LOOP_COLUMNS)


class Direct:
    """In the place of the scorer: hidden states are the log-probs themselves, and their negatives the entropies."""

    def log_probs(self, hidden, chunk, batch):
        return hidden

    def statistics(self, hidden, chunk, batch):
        return TokenStatistics(hidden, -hidden, hidden)

    def prompt_pool(self, hidden, batch):
        return hidden[:, :1]


def table_of(hidden, batch, which, head=None, num_kept=NUM_KEPT) -> tuple[float, dict[str, list[float]]]:
    loss, found = micro_batch_loss(hidden, SimpleNamespace(), batch, Direct(), which, head, num_kept)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    return float(loss), dict(zip(ROLLOUT_COLUMNS, found.t().tolist(), strict=True))


def test_log_z_is_the_heads_where_there_is_one():
    loss, columns = table_of(rows(POLICY), example(), objective(), head=lambda pool: LOG_Z + pool[:, 0])
    assert columns["log_z"] == [-1, -1, -1]
    assert columns["residual"] == [-2, 3, 2]
    assert loss == pytest.approx(17 / 4)
    assert columns["advantage"] == pytest.approx([math.nan] * 3, nan_ok=True)


def test_log_z_is_the_groups_own_where_it_is_whole():
    """-(-1 + 4 + 3)/3 = -2: residuals -3, 2, 1; contrastive: factor 3/2."""
    batch = example(whole_groups=True)
    loss, columns = table_of(rows(POLICY), batch, objective(log_z="group"))
    assert columns["residual"] == pytest.approx([-3, 2, 1])
    assert columns["weight"] == [1, 1, 1]
    assert loss == pytest.approx(14 / 4)
    loss, columns = table_of(rows(POLICY), batch, objective(log_z="contrastive"))
    assert columns["weight"] == pytest.approx([1.5] * 3)
    assert loss == pytest.approx(1.5 * 14 / 4)


def test_log_z_was_said_before_where_groups_are_cut():
    batch = as_kind(example(), EstimatedBatch, log_z=LOG_Z, weight_factor=2 * ONES)
    loss, columns = table_of(rows(POLICY), batch, objective(log_z="contrastive"))
    assert columns["residual"] == [-2, 3, 2]
    assert loss == pytest.approx(2 * 17 / 4)


def test_what_a_rival_does_not_have_is_no_number():
    _, columns = table_of(rows(POLICY), rewarded(), rival())
    for name in ("residual", "log_z", "clipped"):
        assert all(math.isnan(value) for value in columns[name])
    loss, columns = table_of(rows(POLICY), example(), EntropyObjective())
    assert loss == pytest.approx((2 + 2 + 1) / 4)
    for name in ("residual", "log_z", "clipped", "advantage"):
        assert all(math.isnan(value) for value in columns[name])


def test_a_step_without_kept_rollouts_has_loss_0_and_no_nan():
    batch = example(kept=[False] * 3)
    assert table_of(rows(POLICY), batch, objective(), head=lambda pool: LOG_Z, num_kept=0)[0] == 0
    assert table_of(rows(POLICY), batch, EntropyObjective(), num_kept=0)[0] == 0
    assert table_of(rows(POLICY), as_kind(batch, RewardedBatch, advantage=ONES), rival(), num_kept=0)[0] == 0
