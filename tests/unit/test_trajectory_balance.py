"""The objective against numbers worked by hand and closed forms, in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_powerflow.objective.log_z_estimate import contrastive_log_z, group_log_z, loo_log_z
from megatron_powerflow.objective.trajectory_balance import (
    balance_loss,
    importance_weight,
    initial_log_z,
    partial_residual,
    token_spread,
)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_loss_by_hand():
    """Three responses: S = -6, -4, -1; S_ref = -3, -5, -2; n = 3, 2, 1; psi = 0, -.5, 0; alpha 2; log Z' = -1.

    (S - 2 S_ref)/n = 0, 3, 3; minus 2 psi: 0, 4, 3; delta = -1, 3, 2; weights 1, .8, 1.2; loss = (1 + 7.2 + 4.8)/3.
    """
    partial = partial_residual(t(-6, -4, -1), t(-3, -5, -2), t(3, 2, 1), t(0, -0.5, 0), alpha=2.0)
    assert partial.tolist() == [0, 4, 3]
    loss, residual, _ = balance_loss(partial, t(-1, -1, -1), t(1, 0.8, 1.2), torch.tensor([True] * 3), num_kept=3)
    assert residual.tolist() == [-1, 3, 2]
    assert float(loss) == pytest.approx(13 / 3)


def test_a_dropped_response_counts_nowhere():
    arguments = (t(0, 4, 3), t(-1, -1, -1), t(1, 1, 1))
    loss, residual, _ = balance_loss(*arguments, torch.tensor([True, False, True]), num_kept=2)
    assert float(loss) == pytest.approx((1 + 4) / 2)
    assert residual.tolist() == [-1, 3, 2]


@pytest.mark.parametrize(
    ("policy_norm", "reference_norm", "partial"),
    [
        ("length", "length", [0 - 0.5, 3 + 1 + 1, 3]),
        ("none", "none", [0 - 0.5, 6 + 1 + 1, 3]),
        ("none", "length", [-4 - 0.5, 1 + 1 + 1, 3]),
        ("length", "none", [4 - 0.5, 8 + 1 + 1, 3]),
    ],
)
def test_the_residual_of_every_normalisation_by_hand(policy_norm, reference_norm, partial):
    """The three responses of above: S / a - 2 S_ref / c - 2 psi - r, rewards .5, -1, 0."""
    norms = {"policy_norm": policy_norm, "reference_norm": reference_norm}
    arguments = (t(-6, -4, -1), t(-3, -5, -2), t(3, 2, 1), t(0, -0.5, 0))
    assert partial_residual(*arguments, alpha=2.0, reward=t(0.5, -1, 0), **norms).tolist() == partial


def test_the_denominator_is_the_whole_steps():
    """Two micro-batches of a step with three kept rollouts: their shares add up to the loss of all together."""
    arguments = (t(0, 4, 3), t(-1, -1, -1), t(1, 0.5, 1))
    kept = torch.tensor([True] * 3)
    whole = balance_loss(*arguments, kept, 3).loss
    parts = [balance_loss(*(x[part] for x in (*arguments, kept)), 3).loss for part in (slice(0, 1), slice(1, 3))]
    assert float(whole) == pytest.approx((1 + 4.5 + 4) / 3)
    assert float(sum(parts)) == pytest.approx(float(whole))


def test_the_spread_of_tokens_weighs_and_is_dropped_as_the_residual():
    terms = balance_loss(t(0, 4, 3), t(-1, -1, -1), t(2, 1, 1), torch.tensor([True, True, False]), 2, t(5, 6, 7)).terms
    assert terms.tolist() == [2 * (1 + 5), 9 + 6, 0]


def test_the_start_value_is_weighted_and_of_kept_responses():
    partial, weight = t(1, 5, 100), t(3, 1, 7)
    assert initial_log_z(partial, weight, torch.tensor([True, True, False])) == pytest.approx(-(3 + 5) / 4)
    assert initial_log_z(partial, weight, torch.tensor([True, True, True])) == pytest.approx(-708 / 11)


batches = st.integers(1, 6).flatmap(
    lambda size: st.fixed_dictionaries(
        {
            "log_probs": st.lists(st.lists(st.floats(-5, -0.01), min_size=1, max_size=5), min_size=size, max_size=size),
            "reference": st.lists(st.floats(-20, -0.01), min_size=size, max_size=size),
            "psi": st.lists(st.sampled_from([0.0, -0.5]), min_size=size, max_size=size),
            "log_z": st.lists(st.floats(-3, 3), min_size=size, max_size=size),
            "weight": st.lists(st.floats(0.8, 1.2), min_size=size, max_size=size),
            "alpha": st.floats(0.1, 5),
        }
    )
)


@settings(deadline=None)
@given(batches)
def test_gradients_equal_the_closed_forms(batch):
    """Law 8: 2 w delta / (n B) for every response token, (2/B) sum of w delta for log Z'; none through w."""
    size = len(batch["log_probs"])
    tokens = [torch.tensor(row, dtype=torch.float64, requires_grad=True) for row in batch["log_probs"]]
    num_tokens = torch.tensor([len(row) for row in batch["log_probs"]], dtype=torch.float64)
    reference, psi, log_z, weight = (
        torch.tensor(batch[name], dtype=torch.float64, requires_grad=True)
        for name in ("reference", "psi", "log_z", "weight")
    )
    sequence = torch.stack([row.sum() for row in tokens])
    partial = partial_residual(sequence, reference.detach(), num_tokens, psi.detach(), batch["alpha"])
    loss, residual, _ = balance_loss(partial, log_z, weight, torch.ones(size, dtype=torch.bool), num_kept=size)
    loss.backward()
    expected = 2 * weight.detach() * residual.detach() / (num_tokens * size)
    for row, value in zip(tokens, expected, strict=True):
        torch.testing.assert_close(row.grad, value.expand_as(row))
    torch.testing.assert_close(log_z.grad, 2 * weight.detach() * residual.detach() / size)
    assert weight.grad is None


def test_length_normalised_tb_is_la_tb():
    """Law 7: ((S - alpha S_ref)/n + log Z)^2 in value and gradient."""
    generator = torch.Generator().manual_seed(0)
    sequence = -10 * torch.rand(8, generator=generator, dtype=torch.float64)
    reference = -10 * torch.rand(8, generator=generator, dtype=torch.float64)
    num_tokens = torch.randint(1, 9, (8,), generator=generator).double()
    log_z = torch.randn(8, generator=generator, dtype=torch.float64)
    gradients = []
    for formula in ("ours", "theirs"):
        s, z = sequence.clone().requires_grad_(), log_z.clone().requires_grad_()
        if formula == "ours":
            partial = partial_residual(s, reference, num_tokens, torch.zeros(8), 3.0)
            loss = balance_loss(partial, z, torch.ones(8), torch.ones(8, dtype=torch.bool), 8).loss
        else:
            loss = (((s - 3.0 * reference) / num_tokens + z) ** 2).mean()
        loss.backward()
        gradients.append((loss.detach(), s.grad, z.grad))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_at_alpha_1_with_equal_models_the_residual_is_log_z():
    """Law 4, on the arithmetic: S = S_ref to the last bit gives exactly 0."""
    sequence = t(-1.2345678901234567, -9.87)
    partial = partial_residual(sequence, sequence.clone(), t(3, 7), t(0, 0), alpha=1.0)
    assert partial.tolist() == [0.0, 0.0]


def test_the_start_value_makes_the_mean_residual_0():
    """Law 3."""
    reference, num_tokens, psi = t(-3, -8, -1), t(2, 9, 4), t(0, -0.5, -0.5)
    kept = torch.tensor([True, True, True])
    partial = partial_residual(reference, reference, num_tokens, psi, alpha=4.0)
    log_z = initial_log_z(partial, torch.ones(3, dtype=torch.float64), kept)
    assert float((log_z + partial).mean()) == pytest.approx(0.0, abs=1e-12)
    assert log_z == pytest.approx(3 * (-3 / 2 - 8 / 9 - 1 / 4) / 3 + 4 * (-1 / 3))


def test_weights_by_hand():
    sequence, old, num_tokens = t(-1.0, -2.0, -3.0), t(-1.1, -2.0, -2.0), t(2, 1, 10)
    weight, ratio = importance_weight(sequence, old, num_tokens, ratio="seq", clip_epsilon=0.2)
    assert ratio.tolist() == pytest.approx([math.exp(0.1), 1.0, math.exp(-1)])
    assert weight.tolist() == pytest.approx([math.exp(0.1), 1.0, 0.8])
    weight, ratio = importance_weight(sequence, old, num_tokens, ratio="seq_mean", clip_epsilon=0.2)
    assert ratio.tolist() == pytest.approx([math.exp(0.05), 1.0, math.exp(-0.1)])
    assert weight.tolist() == ratio.tolist()
    weight, _ = importance_weight(sequence, old, num_tokens, ratio="none", clip_epsilon=0.2)
    assert weight.tolist() == [1, 1, 1]


def test_the_sides_of_the_clip_by_hand():
    arguments = (t(-3, 0, 3), t(0, 0, 0), t(1, 1, 1))
    both = importance_weight(*arguments, ratio="seq", clip_epsilon=0.2).weight
    assert both.tolist() == pytest.approx([0.8, 1.0, 1.2])
    upper = importance_weight(*arguments, ratio="seq", clip_epsilon=0.2, upper_only=True).weight
    assert upper.tolist() == pytest.approx([math.exp(-3), 1.0, 1.2])


def test_the_spread_of_tokens_by_hand():
    """log pi - 2 log p = 1, 3, and padding: mean 2, variance 1."""
    mask = torch.tensor([[True, True, False]])
    assert token_spread(t(-1, -1, 0)[None], t(-1, -2, 0)[None], mask, 2.0).tolist() == [1.0]


def test_no_gradient_flows_through_the_weight():
    sequence = t(-1.0, -2.0).requires_grad_()
    weight, ratio = importance_weight(sequence, t(-1.2, -2.2), t(1, 1), ratio="seq", clip_epsilon=0.5)
    assert not weight.requires_grad
    assert not ratio.requires_grad


GROUPS = torch.tensor([0, 0, 0, 5, 5])
KEPT = torch.ones(5, dtype=torch.bool)


def test_group_and_leave_one_out_by_hand():
    partial, ones = t(1, 2, 6, 10, 14), t(1, 1, 1, 1, 1)
    assert group_log_z(partial, GROUPS, ones, KEPT).tolist() == [-3, -3, -3, -12, -12]
    assert loo_log_z(partial, GROUPS, ones, KEPT).tolist() == [-4, -3.5, -1.5, -14, -10]


def test_weighted_group_mean_makes_the_weighted_residual_sum_0():
    """Law 11: at unequal weights only the w-weighted mean has sum w delta = 0."""
    partial, weight = t(1, 2, 6, 10, 14), t(0.8, 1.2, 1.0, 0.9, 1.1)
    residual = partial + group_log_z(partial, GROUPS, weight, KEPT)
    assert float((weight * residual)[:3].sum()) == pytest.approx(0.0, abs=1e-12)
    assert float((weight * residual)[3:].sum()) == pytest.approx(0.0, abs=1e-12)
    plain = partial + group_log_z(partial, GROUPS, torch.ones_like(weight), KEPT)
    assert abs(float((weight * plain)[:3].sum())) > 0.1


def test_dropped_members_do_not_enter_the_mean():
    kept = torch.tensor([True, True, False, True, False])
    estimate = group_log_z(t(1, 3, 100, 10, 50), GROUPS, t(1, 1, 1, 1, 1), kept)
    assert estimate.tolist() == [-2, -2, -2, -10, -10]
    alone = loo_log_z(t(1, 3, 100, 10, 50), GROUPS, t(1, 1, 1, 1, 1), kept)
    assert (t(10) + alone[3]).item() == 0.0  # nobody to compare with: no residual


def test_weighted_leave_one_out_by_hand():
    """Weights 1 2 1 | 1 3: -(2 * 2 + 6) / 3, ..., -14, -10."""
    partial, weight = t(1, 2, 6, 10, 14), t(1, 2, 1, 1, 3)
    expected = [-(4 + 6) / 3, -(1 + 6) / 2, -(1 + 4) / 3, -14, -10]
    assert loo_log_z(partial, GROUPS, weight, KEPT).tolist() == pytest.approx(expected)


def test_the_contrastive_factor_counts_kept_members():
    """Of three with weights 1 2 4 the last is dropped: W / (G - 1) = 3 / 1; alone: the weight itself."""
    kept = torch.tensor([True, True, False, True, False])
    log_z, factor = contrastive_log_z(t(1, 4, 6, 10, 14), GROUPS, t(1, 2, 4, 0.5, 3), kept)
    assert log_z.tolist() == [-3, -3, -3, -10, -10]
    assert factor.tolist() == [3, 3, 3, 0.5, 0.5]


def gradient_of(estimator: str, partial: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    s = partial.clone().requires_grad_()
    factor = torch.ones_like(partial)
    if estimator == "contrastive":
        log_z, factor = contrastive_log_z(s, GROUPS, weight, KEPT)
    else:
        log_z = {"group": group_log_z, "loo": loo_log_z}[estimator](s, GROUPS, weight, KEPT)
    assert not log_z.requires_grad
    balance_loss(s, log_z, weight * factor, KEPT, num_kept=5).loss.backward()
    return s.grad


def test_contrastive_gradient_equals_leave_one_out_and_the_pairwise_formula():
    partial, ones = t(1, 2, 6, 10, 14), t(1, 1, 1, 1, 1)
    contrastive = gradient_of("contrastive", partial, ones)
    torch.testing.assert_close(contrastive, gradient_of("loo", partial, ones))
    s = partial.clone().requires_grad_()
    pairs = 0
    for members in (range(3), range(3, 5)):
        for i in members:
            for j in members:
                if i < j:
                    pairs = pairs + (s[i] - s[j]) ** 2 / (len(members) - 1)
    (pairs / 5).backward()
    torch.testing.assert_close(contrastive, s.grad)


def test_weighted_contrastive_equals_its_pairwise_formula():
    partial, weight = t(1, 2, 6, 10, 14), t(0.8, 1.2, 1.0, 0.9, 1.1)
    s = partial.clone().requires_grad_()
    pairs = 0
    for members in (range(3), range(3, 5)):
        for i in members:
            for j in members:
                if i < j:
                    pairs = pairs + weight[i] * weight[j] * (s[i] - s[j]) ** 2 / (len(members) - 1)
    (pairs / 5).backward()
    torch.testing.assert_close(gradient_of("contrastive", partial, weight), s.grad)


def test_detached_and_attached_group_mean_give_one_gradient_at_equal_weights():
    """Law 11, first half."""
    partial = t(1, 2, 6, 10, 14)
    s = partial.clone().requires_grad_()
    centred = torch.cat([s[:3] - s[:3].mean(), s[3:] - s[3:].mean()])
    (centred.square().sum() / 5).backward()
    torch.testing.assert_close(gradient_of("group", partial, t(1, 1, 1, 1, 1)), s.grad)


def test_group_gradient_is_1_minus_1_over_g_of_leave_one_out():
    """Law 9, sample by sample: s - mean = (1 - 1/G) (s - mean of the others)."""
    partial, ones = t(1, 2, 6, 10, 14), t(1, 1, 1, 1, 1)
    group, loo = gradient_of("group", partial, ones), gradient_of("loo", partial, ones)
    torch.testing.assert_close(group[:3], loo[:3] * (1 - 1 / 3))
    torch.testing.assert_close(group[3:], loo[3:] * (1 - 1 / 2))
