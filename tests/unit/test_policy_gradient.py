"""Advantages and surrogates against numbers worked by hand, and one gradient for every ratio."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_powerflow.objective.policy_gradient import group_advantage, kl_terms, power_reward, surrogate_terms

GROUPS = torch.tensor([0, 0, 0, 0, 7, 7])
KEPT = torch.ones(6, dtype=torch.bool)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_advantages_by_hand():
    """Rewards 1 0 0 1: mean .5, std with G - 1: sqrt(4 * .25 / 3) = .57735; a group of equals has none."""
    reward = t(1, 0, 0, 1, 3, 3)
    plain = group_advantage(reward, GROUPS, KEPT, divide_by_std=False)
    assert plain.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0]
    scaled = group_advantage(reward, GROUPS, KEPT, divide_by_std=True)
    assert scaled.tolist() == pytest.approx([x / (math.sqrt(1 / 3) + 1e-6) for x in (0.5, -0.5, -0.5, 0.5)] + [0, 0])


def test_the_advantage_is_grpos_published_formula():
    """(r - mean) / (std + 1e-6) over 20 random groups, by torch's own mean and std."""
    generator = torch.Generator().manual_seed(0)
    reward = torch.rand(20, 8, generator=generator, dtype=torch.float64)
    groups = torch.arange(20).repeat_interleave(8)
    ours = group_advantage(reward.flatten(), groups, torch.ones(160, dtype=torch.bool), divide_by_std=True)
    theirs = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)
    torch.testing.assert_close(ours, theirs.flatten())


def test_dropped_members_have_no_advantage_and_no_part_in_the_mean():
    kept = torch.tensor([True, True, False, False, True, False])
    advantage = group_advantage(t(1, 3, 100, 100, 5, 9), GROUPS, kept, divide_by_std=False)
    assert advantage.tolist() == [-1, 1, 0, 0, 0, 0]


def test_power_reward_by_hand():
    """alpha S_ref - S + alpha psi = 2 (-3) + 4 + 2 (-.5) = -3; over n = 2: -1 - 1 = -2."""
    arguments = (t(-4), t(-3), t(2), t(-0.5), 2.0)
    assert power_reward(*arguments, "none").tolist() == [-3.0]
    assert power_reward(*arguments, "length").tolist() == [-2.0]


LOG_PROBS = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.5, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])
NUM_TOKENS = torch.tensor([3, 2])


@pytest.mark.parametrize("score_norm", ["none", "length"])
@pytest.mark.parametrize("ratio", ["none", "seq", "seq_mean", "token"])
def test_on_policy_every_ratio_has_the_gradient_of_reinforce(ratio, score_norm):
    log_probs = LOG_PROBS.clone().requires_grad_()
    advantage = t(0.7, -1.3)
    terms, ratios, clipped, _ = surrogate_terms(
        log_probs, LOG_PROBS, MASK, advantage, NUM_TOKENS, ratio=ratio, score_norm=score_norm, clip_epsilon=0.2
    )
    terms.sum().backward()
    divisor = NUM_TOKENS if score_norm == "length" else torch.ones(2)
    expected = torch.where(MASK, -(advantage / divisor)[:, None], 0.0)
    torch.testing.assert_close(torch.where(MASK, log_probs.grad, 0.0), expected)
    assert ratios.tolist() == [1, 1]
    assert clipped.tolist() == [0, 0]


def test_the_clip_acts_on_the_side_that_the_advantage_names():
    """rho = e^.5: clipped to 1.2 for A > 0, where it has no gradient; not for A < 0. rho = e^-.5: the other way."""
    old = torch.zeros(4, 1, dtype=torch.float64)
    log_probs = t(0.5, 0.5, -0.5, -0.5)[:, None].requires_grad_()
    advantage, ones = t(1, -1, 1, -1), torch.ones(4, 1, dtype=torch.bool)
    arguments = (log_probs, old, ones, advantage, torch.ones(4))
    terms, _, clipped, _ = surrogate_terms(*arguments, ratio="token", score_norm="none", clip_epsilon=0.2)
    assert terms.tolist() == pytest.approx([-1.2, math.exp(0.5), -math.exp(-0.5), 0.8])
    assert clipped.tolist() == [1, 1, 1, 1]
    terms.sum().backward()
    assert log_probs.grad.flatten().tolist() == pytest.approx([0, math.exp(0.5), -math.exp(-0.5), 0])
    upper, _, clipped, _ = surrogate_terms(
        *arguments, ratio="token", score_norm="none", clip_epsilon=0.2, upper_only=True
    )
    assert upper.tolist() == pytest.approx([-1.2, math.exp(0.5), -math.exp(-0.5), math.exp(-0.5)])
    assert clipped.tolist() == [1, 1, 0, 0]


def test_the_reward_of_a_policy_gradient_has_no_gradient():
    policy = t(-4).requires_grad_()
    assert not power_reward(policy, t(-3), t(2), t(-0.5), 2.0, "length").requires_grad
    assert not group_advantage(policy * 2, torch.tensor([0]), torch.tensor([True]), divide_by_std=True).requires_grad


def test_two_make_a_group():
    advantage = group_advantage(t(1, 3, 100, 100, 5, 9), GROUPS, torch.tensor([True] * 6), divide_by_std=False)
    assert advantage.tolist()[4:] == [-2, 2]


def test_padding_takes_no_part_in_a_surrogate():
    """n = 2 of 3 positions; token ratios e^.1, e^-.3, of which the second is clipped at .8; A = 2."""
    old = torch.tensor([[-1.0, -1.0, 0.0]], dtype=torch.float64)
    arguments = (old + torch.tensor([[0.1, -0.3, 0.0]]), old, torch.tensor([[True, True, False]]), t(2), t(2))
    settings = {"score_norm": "none", "clip_epsilon": 0.2}
    terms, _, clipped, _ = surrogate_terms(*arguments, ratio="token", **settings)
    assert terms.tolist() == pytest.approx([-2 * (math.exp(0.1) + math.exp(-0.3))])
    assert clipped.tolist() == [0.5]
    terms, ratio, clipped, _ = surrogate_terms(*arguments, ratio="seq_mean", **settings)
    assert ratio.tolist() == pytest.approx([math.exp(-0.1)])
    assert terms.tolist() == pytest.approx([-2 * 2 * math.exp(-0.1)])
    assert clipped.tolist() == [0]
    terms, _, clipped, _ = surrogate_terms(*arguments, ratio="seq", score_norm="length", clip_epsilon=0.1)
    assert terms.tolist() == pytest.approx([-2 * math.exp(-0.2) / 2])
    assert clipped.tolist() == [1]


def test_the_kl_estimate_by_hand():
    """d = log p - log pi = 1, -1, and padding: (e - 2 + 1/e) / 2."""
    log_probs, reference = t(-2, -1, 0)[None], t(-1, -2, 0)[None]
    assert kl_terms(log_probs, reference, t(2)).tolist() == pytest.approx([(math.e - 2 + 1 / math.e) / 2])
    one_sided = kl_terms(log_probs[:, :1], reference[:, :1], t(1))
    assert one_sided.tolist() == pytest.approx([math.e - 2])


def test_kl_is_0_for_equals_and_positive_for_others():
    assert kl_terms(LOG_PROBS, LOG_PROBS, NUM_TOKENS).tolist() == [0, 0]
    assert (kl_terms(LOG_PROBS, LOG_PROBS - torch.tensor([0.1, -0.2, 0.0]), NUM_TOKENS) > 0).all()


def test_the_kl_estimate_is_unbiased():
    """Enumerated over a vocabulary of four: the expectation under pi is KL(pi || p_ref)."""
    pi, reference = t(0.1, 0.2, 0.3, 0.4), t(0.4, 0.3, 0.2, 0.1)
    terms = kl_terms(pi.log()[:, None], reference.log()[:, None], torch.ones(4))
    assert float((pi * terms).sum()) == pytest.approx(float((pi * (pi / reference).log()).sum()))


# of tokens: ratios e^.1 e^-.3 | e^.5, clipped at .8 and 1.2; A = 2, -1
NEW = torch.tensor([[-0.9, -1.3, 0.0], [-0.5, 0.0, 0.0]], dtype=torch.float64)
OLD = torch.tensor([[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]], dtype=torch.float64)
RESPONSES = torch.tensor([[True, True, False], [True, False, False]])


def weighted(ratio: str, sampler_weight, score_norm="none"):
    arguments = (NEW, OLD, RESPONSES, t(2, -1), torch.tensor([2, 1]))
    settings = {"ratio": ratio, "score_norm": score_norm, "clip_epsilon": 0.2}
    return surrogate_terms(*arguments, **settings, sampler_weight=sampler_weight)


@pytest.mark.parametrize("ratio", ["none", "seq", "seq_mean", "token"])
def test_the_weight_of_a_response_multiplies_its_term(ratio):
    """And is in the whole weight, whose w is the clipped ratio, of tokens their mean."""
    plain, found = weighted(ratio, None), weighted(ratio, t(0.5, 3))
    torch.testing.assert_close(found.terms, plain.terms * t(0.5, 3))
    assert found.ratio.equal(plain.ratio)
    assert found.clipped.equal(plain.clipped)
    w = {"none": (1, 1), "seq": (math.exp(-0.2), 1.2), "seq_mean": (math.exp(-0.1), 1.2)}
    w["token"] = ((math.exp(0.1) + 0.8) / 2, 1.2)
    assert plain.importance.tolist() == pytest.approx(w[ratio])
    assert found.importance.tolist() == pytest.approx([0.5 * w[ratio][0], 3 * w[ratio][1]])


def test_the_weight_of_a_token_multiplies_its_part_of_the_sum():
    v = torch.tensor([[0.5, 2.0, 1.0], [1.5, 1.0, 1.0]], dtype=torch.float64)
    found = weighted("token", v)
    assert found.terms.tolist() == pytest.approx([-2 * (0.5 * math.exp(0.1) + 2 * math.exp(-0.3)), 1.5 * math.exp(0.5)])
    assert found.importance.tolist() == pytest.approx([(0.5 * math.exp(0.1) + 2 * 0.8) / 2, 1.5 * 1.2])
    found = weighted("none", v, "length")
    assert found.terms.tolist() == pytest.approx([2 * (0.5 * 0.9 + 2 * 1.3) / 2, -1.5 * 0.5])
    assert found.importance.tolist() == pytest.approx([1.25, 1.5])


@pytest.mark.parametrize("ratio", ["seq", "seq_mean"])
def test_a_surrogate_of_whole_responses_has_no_weights_of_tokens(ratio):
    with pytest.raises(AssertionError, match="no sum over tokens"):
        weighted(ratio, torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("ratio", ["none", "seq", "seq_mean", "token"])
def test_a_weight_of_1_changes_no_bit(ratio):
    plain = weighted(ratio, None, "length")
    for ones in [t(1, 1), *([torch.ones(2, 3, dtype=torch.float64)] if ratio in ("none", "token") else [])]:
        assert all(a.equal(b) for a, b in zip(plain, weighted(ratio, ones, "length"), strict=True))
