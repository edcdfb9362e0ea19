"""The laws of the method on models small enough to enumerate, in fp64, with exact expectations in place of samples.

A policy over K responses is a softmax of K free logits: enough for every law but those about tokens.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_powerflow.objective.log_z_estimate import group_log_z, loo_log_z
from megatron_powerflow.objective.policy_gradient import power_reward
from megatron_powerflow.objective.sampler_weight import sampler_weight
from megatron_powerflow.objective.trajectory_balance import (
    Norm,
    balance_loss,
    importance_weight,
    partial_residual,
    token_spread,
)

SYMBOLS, MAX_TOKENS = 3, 4


def responses() -> list[tuple[int, ...]]:
    """Bodies of up to MAX_TOKENS symbols, EOS (0) behind those that are shorter: 121."""
    bodies = [body for n in range(MAX_TOKENS + 1) for body in itertools.product(range(1, SYMBOLS + 1), repeat=n)]
    return [body if len(body) == MAX_TOKENS else (*body, 0) for body in bodies]


RESPONSES = responses()
LENGTHS = torch.tensor([len(response) for response in RESPONSES], dtype=torch.float64)
ZERO = torch.zeros(len(RESPONSES), dtype=torch.float64)
ALL = torch.ones(len(RESPONSES), dtype=torch.bool)


def base_log_probs(seed: int = 0) -> torch.Tensor:
    """[K] log-probs under an autoregressive model of random tables; they sum to 1, cut responses included."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(MAX_TOKENS, SYMBOLS + 1, SYMBOLS + 1, generator=generator, dtype=torch.float64).log_softmax(-1)
    totals = []
    for response in RESPONSES:
        previous, total = 0, torch.zeros((), dtype=torch.float64)
        for place, token in enumerate(response):
            total = total + tables[place, previous, token]
            previous = token
        totals.append(total)
    return torch.stack(totals)


BASE = base_log_probs()


def root(energy: torch.Tensor, lengths: torch.Tensor = LENGTHS) -> float:
    """lambda with sum exp(energy - lambda n) = 1."""
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.logsumexp(energy - middle * lengths, 0) > 0 else (low, middle)
    return middle


def expected_gradient(policy: torch.Tensor, loss_terms) -> torch.Tensor:
    """d/d logits of E_pi[loss(y)], the sampling held fixed: what an on-policy step follows on average."""
    logits = policy.clone().requires_grad_()
    log_pi = logits.log_softmax(0)
    (log_pi.detach().exp() * loss_terms(log_pi)).sum().backward()
    return logits.grad


def residuals(log_pi, alpha: float, log_z: float, *, policy_norm: Norm = "length", reference_norm: Norm = "length"):
    partial = partial_residual(
        log_pi, BASE, LENGTHS, ZERO, alpha, policy_norm=policy_norm, reference_norm=reference_norm
    )
    return log_z + partial


def descend(alpha: float, psi: torch.Tensor = ZERO, lengths: torch.Tensor = LENGTHS, steps: int = 3000):
    """(policy [K], log Z') after exact gradient descent on LA-TB with a learned scalar log Z'.

    The gradient of a logit is divided by its response's probability (the natural gradient of a softmax), or rare
    responses would take for ever.
    """
    logits, log_z = BASE.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        log_pi = logits.log_softmax(0)
        partial = partial_residual(log_pi, BASE, lengths, psi, alpha)
        terms = balance_loss(partial, log_z.expand_as(partial), torch.ones_like(partial), ALL, 1.0).terms
        pi = log_pi.detach().exp()
        by_logits, by_log_z = torch.autograd.grad((pi * terms).sum(), (logits, log_z))
        with torch.no_grad():
            logits -= 0.25 * by_logits / pi
            log_z -= 0.25 * by_log_z
    return logits.detach().softmax(0), float(log_z)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_law_1_the_fixed_point_is_the_tilted_power(alpha):
    policy, log_z = descend(alpha)
    tilt = root(alpha * BASE)
    optimum = (alpha * BASE - tilt * LENGTHS).exp()
    assert float((policy - optimum).abs().sum() / 2) < 1e-6
    assert log_z == pytest.approx(tilt, abs=1e-6)
    assert residuals(optimum.log(), alpha, tilt).abs().max() < 1e-9


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 1.5, 4.0])
def test_law_2_the_sign_of_lambda_is_opposite_to_that_of_alpha_minus_1(alpha):
    """By our estimator, of what residuals there are at the optimum."""
    optimum = alpha * BASE - root(alpha * BASE) * LENGTHS
    partial = partial_residual(optimum, BASE, LENGTHS, ZERO, alpha)
    log_z = group_log_z(partial, torch.zeros(len(BASE), dtype=torch.int64), torch.ones_like(BASE), ALL)[0].item()
    assert log_z == pytest.approx(0.0, abs=1e-12) if alpha == 1 else log_z * (alpha - 1) < -1e-3


def test_law_5_log_z_is_stationary_where_the_mean_residual_is_0():
    """d/d log Z' E[delta^2] = 2 E[delta]: 0 at log Z' = E[(log p~ - log pi) / n], and only there."""
    pi = BASE.exp()
    stationary = -float((pi * residuals(BASE, 4.0, 0.0)).sum())
    for log_z in (stationary, stationary + 0.3):
        z = torch.tensor(log_z, dtype=torch.float64, requires_grad=True)
        (pi * (z + residuals(BASE, 4.0, 0.0)).square()).sum().backward()
        assert float(z.grad) == pytest.approx(2 * (log_z - stationary), abs=1e-12)


def test_law_6_log_z_is_a_free_baseline_of_tb_and_not_of_la_tb():
    gradients = {}
    for name, norm in (("traj", "none"), ("la", "length")):
        for log_z in (0.0, 3.0):

            def terms(log_pi, log_z=log_z, norm: Norm = norm):
                return residuals(log_pi, 2.0, log_z, policy_norm=norm, reference_norm=norm).square()

            gradients[name, log_z] = expected_gradient(BASE, terms)
    torch.testing.assert_close(gradients["traj", 0.0], gradients["traj", 3.0], atol=1e-12, rtol=0)
    assert (gradients["la", 0.0] - gradients["la", 3.0]).abs().max() > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_law_6_the_optimum_of_tb_and_of_rl_is_the_power_distribution(alpha):
    """At p_alpha the expected gradients of TB-traj (with any log Z) and of RL-traj are 0; at pi* they are not."""
    power = (alpha * BASE).log_softmax(0)
    tilted = alpha * BASE - root(alpha * BASE) * LENGTHS

    def balance(log_pi):
        return residuals(log_pi, alpha, 0.7, policy_norm="none", reference_norm="none").square()

    def reinforce(log_pi):
        return -power_reward(log_pi, BASE, LENGTHS, ZERO, alpha, "none") * log_pi

    for terms in (balance, reinforce):
        assert expected_gradient(power, terms).abs().max() < 1e-12
        assert expected_gradient(tilted, terms).abs().max() > 1e-4
    torch.testing.assert_close(2 * expected_gradient(tilted, reinforce), expected_gradient(tilted, balance))


def test_rl_token_and_token_score_share_the_optimum_of_la_tb():
    """The score is not divided by n, the residual is: stationary where every residual is 0, as LA-TB."""
    tilted = 4.0 * BASE - root(4.0 * BASE) * LENGTHS
    for terms in (
        lambda log_pi: -power_reward(log_pi, BASE, LENGTHS, ZERO, 4.0, "length") * log_pi,
        lambda log_pi: LENGTHS * residuals(log_pi, 4.0, root(4.0 * BASE)).square(),
    ):
        assert expected_gradient(tilted, terms).abs().max() < 1e-12
        assert expected_gradient(BASE, terms).abs().max() > 1e-4


@pytest.mark.parametrize(("estimator", "factor"), [(group_log_z, 0.5), (loo_log_z, 1.0)])
def test_law_9_the_expected_gradient_of_group_estimators(estimator, factor):
    """All pairs enumerated (G = 2): (1 - 1/G) times calibrated LA-TB's gradient for `group`, 1 for `loo`."""
    alpha, pi = 2.0, BASE.exp()
    calibrated = -float((pi * residuals(BASE, alpha, 0.0)).sum())
    expected = expected_gradient(BASE, lambda log_pi: residuals(log_pi, alpha, calibrated).square())
    count = len(RESPONSES)
    first, second = (
        index.flatten() for index in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    )
    members, groups = torch.stack([first, second], 1).flatten(), torch.arange(count * count).repeat_interleave(2)
    logits = BASE.clone().requires_grad_()
    partial = residuals(logits.log_softmax(0), alpha, 0.0)[members]
    ones = torch.ones_like(partial)
    log_z = estimator(partial, groups, ones.detach(), torch.ones_like(ones, dtype=torch.bool))
    terms = balance_loss(partial, log_z, ones, torch.ones_like(ones, dtype=torch.bool), 2.0).terms
    chance = (pi[first] * pi[second]).repeat_interleave(2)
    (chance * terms / 2).sum().backward()
    torch.testing.assert_close(logits.grad, factor * expected, atol=1e-12, rtol=1e-9)


def test_law_10_the_group_estimator_is_stationary_at_the_same_optimum():
    tilted = 4.0 * BASE - root(4.0 * BASE) * LENGTHS
    partial = partial_residual(tilted, BASE, LENGTHS, ZERO, 4.0)
    log_z = group_log_z(partial, torch.zeros(len(BASE), dtype=torch.int64), torch.ones_like(BASE), ALL)
    assert (partial + log_z).abs().max() < 1e-9
    assert float(log_z[0]) == pytest.approx(root(4.0 * BASE))


def test_law_12_the_length_is_that_of_the_tilted_power():
    policy, _ = descend(2.0)
    optimum = (2.0 * BASE - root(2.0 * BASE) * LENGTHS).exp()
    power = (2.0 * BASE).softmax(0)
    assert float((policy * LENGTHS).sum()) == pytest.approx(float((optimum * LENGTHS).sum()), abs=1e-5)
    assert abs(float(((optimum - power) * LENGTHS).sum())) > 0.05  # the tilt is what makes the difference


def test_law_12_a_policy_linear_in_length_is_its_own_optimum():
    """log p_base = -c n exactly: pi* = p_base at every alpha."""
    rate = root(torch.zeros_like(BASE))  # sum exp(-rate n) = 1
    linear = -rate * LENGTHS
    for alpha in (0.5, 4.0):
        residual = partial_residual(linear, linear, LENGTHS, ZERO, alpha) + root(alpha * linear)
        assert residual.abs().max() < 1e-12


def test_law_12_expected_length_is_not_bound_to_the_base():
    """Memoryless tokens .5 .25 .2, EOS .05: mean 20; the tilted power's is 10,882 at alpha 4, 8.4 at .5."""
    tokens = torch.tensor([0.05, 0.5, 0.25, 0.2], dtype=torch.float64).log()  # EOS first
    counts = torch.tensor([[1, 0, 0, 0], [1, 9, 5, 5], [1, 400, 30, 4]], dtype=torch.float64)  # of each token
    for alpha, expected in ((1.0, 20.0), (4.0, 10882.0), (0.5, 8.4)):
        cooled = (alpha * tokens).log_softmax(0)
        assert float(1 / cooled[0].exp()) == pytest.approx(expected, rel=2e-3)  # mean of a geometric length
        partial = partial_residual(counts @ cooled, counts @ tokens, counts.sum(1), torch.zeros(3), alpha)
        assert partial.std() < 1e-12  # and this is the fixed point, whatever the length


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_law_13_a_memoryless_model_is_sampled_at_temperature_1_over_alpha(alpha):
    """lambda = log sum_v p_v^alpha, whatever the length limit."""
    tokens = torch.tensor([0.1, 0.5, 0.25, 0.15], dtype=torch.float64).log()  # EOS first
    base = torch.stack([tokens[list(response)].sum() for response in RESPONSES])
    tilt = float(torch.logsumexp(alpha * tokens, 0))
    assert root(alpha * base) == pytest.approx(tilt, abs=1e-12)
    cooled = (alpha * tokens).log_softmax(0)
    expected = torch.stack([cooled[list(response)].sum() for response in RESPONSES])
    torch.testing.assert_close(alpha * base - tilt * LENGTHS, expected)
    assert (partial_residual(expected, base, LENGTHS, ZERO, alpha) + tilt).abs().max() < 1e-12


def test_law_14_length_counts_eos_and_cut_responses_count_what_they_have():
    assert float(BASE.exp().sum()) == pytest.approx(1.0, abs=1e-12)  # EOS and cut responses included
    without_eos = torch.tensor([float(len(r) - (r[-1] == 0)) for r in RESPONSES], dtype=torch.float64)
    tilted = 4.0 * BASE - root(4.0 * BASE) * LENGTHS
    wrong = partial_residual(tilted, BASE, without_eos.clamp(min=1), ZERO, 4.0)
    assert wrong.std() > 1e-2  # no log Z' makes these 0
    right = partial_residual(tilted, BASE, LENGTHS, ZERO, 4.0)
    assert right.std() < 1e-9


def test_law_15_psi_tilts_by_alpha_n_psi():
    psi = torch.tensor([-0.5 if sum(response) % 2 else 0.0 for response in RESPONSES], dtype=torch.float64)
    policy, log_z = descend(2.0, psi=psi)
    energy = 2.0 * BASE + 2.0 * LENGTHS * psi
    optimum = (energy - root(energy) * LENGTHS).exp()
    assert float((policy - optimum).abs().sum() / 2) < 1e-6
    assert log_z == pytest.approx(root(energy), abs=1e-6)


def test_a_tilt_cap_bounds_the_tilt():
    """Fixed point p_base^alpha exp(-lambda min(n, M)): exact, and no response gains more than |lambda| M."""
    capped = LENGTHS.clamp(max=2)
    policy, log_z = descend(4.0, lengths=capped)
    tilt = root(4.0 * BASE, capped)
    optimum = (4.0 * BASE - tilt * capped).exp()
    assert float((policy - optimum).abs().sum() / 2) < 1e-6
    assert log_z == pytest.approx(tilt, abs=1e-6)


def test_the_per_token_loss_is_the_mean_of_squared_token_residuals():
    generator = torch.Generator().manual_seed(0)
    log_probs, reference = -torch.rand(2, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.arange(6)[None] < torch.tensor([6, 4, 1, 2, 5])[:, None]
    log_probs, reference = log_probs * mask, reference * mask
    length, zero = mask.sum(1).double(), torch.zeros(5, dtype=torch.float64)
    partial = partial_residual(log_probs.sum(1), reference.sum(1), length, zero, 3.0)
    spread = token_spread(log_probs, reference, mask, 3.0)
    every = torch.ones(5, dtype=torch.bool)
    ours = balance_loss(partial, zero - 1.5, zero + 1.0, every, 5.0, spread).loss
    tokens = (-1.5 + log_probs - 3.0 * reference).square() * mask
    torch.testing.assert_close(ours, (tokens.sum(1) / length).mean())


def test_the_upper_clip_leaves_small_ratios_alone():
    t = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    arguments = (t, torch.zeros(3, dtype=torch.float64), torch.ones(3))
    both = importance_weight(*arguments, ratio="seq", clip_epsilon=0.2).weight
    upper = importance_weight(*arguments, ratio="seq", clip_epsilon=0.2, upper_only=True).weight
    assert both.tolist() == pytest.approx([0.8, 1.0, 1.2])
    assert upper.tolist() == pytest.approx([2.718281828**-3, 1.0, 1.2])


@pytest.mark.parametrize("log_z", [-0.7, 0.4])
def test_under_any_sampler_the_weight_v_gives_the_expected_gradient_of_the_policys_own_samples(log_z):
    """sum mu(y) v(y) d delta^2 = sum pi(y) d delta^2 while v = pi / mu is not truncated; at a cap of 1 they differ."""
    sampler, policy = base_log_probs(seed=1), base_log_probs(seed=2)

    def expected_gradient(probabilities: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        own = policy.clone().requires_grad_()
        partial = partial_residual(own, BASE, LENGTHS, ZERO, 2.0)
        terms = balance_loss(partial, torch.full_like(own, log_z), weight, ALL, 1).terms
        (probabilities * terms).sum().backward()
        return own.grad

    def v(cap: float) -> torch.Tensor:
        return sampler_weight(policy, sampler, LENGTHS, ratio="seq", cap=cap).weight

    own_samples = expected_gradient(policy.exp(), torch.ones_like(policy))
    torch.testing.assert_close(expected_gradient(sampler.exp(), v(1e9)), own_samples, rtol=1e-9, atol=1e-12)
    assert (expected_gradient(sampler.exp(), v(1.0)) - own_samples).abs().max() > 1e-3
    assert (expected_gradient(sampler.exp(), torch.ones_like(policy)) - own_samples).abs().max() > 1e-3
