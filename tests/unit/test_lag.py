"""Responses that older weights have written: what holds of optimum, estimates and weights, and what does not.

On the 63 responses of `tests/toy_language.py`, in fp64; expectations are exact unless a name says that it trains.
"""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import lag as benchmark
from benchmarks.lag import balance, expected_gradient, gradient, largest_curvature
from megatron_powerflow.objective.log_z_estimate import group_log_z, loo_log_z
from megatron_powerflow.objective.trajectory_balance import balance_loss, importance_weight, partial_residual
from tests.lagged_training import LAGS, Training, draw, loss_of, train, writers
from tests.toy_language import (
    LENGTHS,
    RESPONSES,
    logits_of,
    optimum,
    random_logits,
    root,
    token_log_probs,
    total_variation,
)

BASE = token_log_probs(random_logits(3))  # [63, 6]
S_REF = BASE.sum(dim=1)
ZERO, EVERY = torch.zeros_like(LENGTHS), torch.ones(len(RESPONSES), dtype=torch.bool)
# tables of six steps that have nothing to do with one another: staler than any lag
STRANGERS = [token_log_probs(random_logits(seed))[None] for seed in range(10, 16)]
LOG_Z = ("mlp", "scalar", "group", "loo", "contrastive")
WEIGHTS = {"none": ("none", None), "w": ("seq", None), "sampler": ("none", 2.0)}


def partial_of(sequence: torch.Tensor, alpha: float, norm: str = "length") -> torch.Tensor:
    return partial_residual(sequence, S_REF, LENGTHS, ZERO, alpha, policy_norm=norm, reference_norm=norm)


def test_the_table_of_a_distribution_gives_it_back():
    best = optimum(S_REF, 4.0)
    assert float(S_REF.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(token_log_probs(logits_of(best)).sum(dim=1), best, atol=1e-10, rtol=0)


@pytest.mark.parametrize("lag", [*LAGS, "frozen"])
def test_every_batch_of_any_writers_is_at_rest_at_the_optimum(lag):
    """Not only on average: no residual, so no gradient and no noise, for any log Z' and weight."""
    alpha = 2.0
    best = optimum(S_REF, alpha)
    batch = draw(writers(STRANGERS, lag), 8, 4, torch.Generator().manual_seed(0))
    for log_z in LOG_Z:
        for weight in WEIGHTS.values():
            moved = {}
            for name, table in (("optimum", logits_of(best)), ("base", random_logits(3))):
                logits = table[None].clone().requires_grad_()
                learned = torch.full((1,), root(alpha * S_REF), dtype=torch.float64, requires_grad=True)
                setup = balance(alpha, log_z, weight)
                says = learned if log_z in ("mlp", "scalar") else None
                loss, _ = loss_of(setup, BASE[None], token_log_probs(logits), batch, says)
                (loss + 0.0 * learned.sum()).backward()
                moved[name] = float(logits.grad.abs().max()), float(learned.grad.abs().max())
            assert max(moved["optimum"]) < 1e-10
            assert moved["base"][0] > 1e-3


@pytest.mark.parametrize("ratio", ["none", "seq"])
def test_the_expected_gradient_leaves_no_other_place_to_rest(ratio):
    """It is v - pi sum(v), v = 2 mu w delta / n, and sum(n v) = 0 where log Z' rests: all 0 only if every delta is.

    For then v = pi sum(v) has one sign, and with sum(n v) = 0 it is 0.
    """
    mu, sequence = STRANGERS[0][0].sum(dim=1), token_log_probs(random_logits(5)).sum(dim=1)
    weight = importance_weight(sequence, mu, LENGTHS, ratio=ratio, clip_epsilon=0.2).weight
    logits = sequence.clone().requires_grad_()
    partial = partial_of(logits.log_softmax(0), 2.0)
    chance = mu.exp() * weight
    log_z = -(chance * partial.detach()).sum() / chance.sum()
    loss, residual, _ = balance_loss(partial, log_z.expand_as(partial), chance, EVERY, 1.0)
    loss.backward()
    v = 2.0 * chance * residual.detach() / LENGTHS
    torch.testing.assert_close(logits.grad, v - sequence.exp() * v.sum(), atol=1e-12, rtol=1e-9)
    assert abs(float((LENGTHS * v).sum())) < 1e-12 < float(v.abs().max())


@pytest.mark.parametrize("learned", [True, False])
def test_expected_descent_four_steps_behind_ends_at_the_optimum(learned):
    """By Adam, from the base. not learned: the mean of a group without end."""
    logits, log_z, history = S_REF.clone().requires_grad_(), torch.zeros((), dtype=torch.float64), []
    optimizer, num_steps = torch.optim.Adam([logits], betas=(0.9, 0.95), eps=1e-12), 800
    one_group = torch.zeros(len(RESPONSES), dtype=torch.int64)
    for step in range(num_steps):
        log_pi = logits.log_softmax(0)
        history.append(log_pi.detach())
        chance = history[max(step - 4, 0)].exp()
        partial = partial_of(log_pi, 4.0)
        says = log_z.expand_as(partial) if learned else group_log_z(partial, one_group, chance, EVERY)
        loss, residual, _ = balance_loss(partial, says, chance, EVERY, 1.0)
        (logits.grad,) = torch.autograd.grad(loss, logits)
        optimizer.param_groups[0]["lr"] = 0.05 * (1.0 - step / num_steps) ** 2
        optimizer.step()
        log_z -= 0.5 * (chance * residual.detach()).sum()
    assert float(total_variation(logits.detach().log_softmax(0), optimum(S_REF, 4.0))) < 1e-4
    assert float(-partial[0].detach()) == pytest.approx(root(4.0 * S_REF), abs=1e-3)


PROMPTS = torch.stack([random_logits(3), random_logits(1)])


@pytest.mark.parametrize(
    ("lag", "alpha", "log_z", "weight"),
    [
        ("4", 4.0, "group", "none"),
        ("in_flight", 4.0, "mlp", "sampler"),
        ("4", 0.5, "mlp", "w"),
        ("in_flight", 0.5, "loo", "none"),
        ("mixed", 2.0, "contrastive", "sampler"),
    ],
)
def test_training_behind_the_policy_ends_at_its_optimum(lag, alpha, log_z, weight):
    targets = torch.stack([optimum(token_log_probs(base).sum(dim=1), alpha) for base in PROMPTS])
    course = train(
        balance(alpha, log_z, WEIGHTS[weight]), PROMPTS, targets, lag, Training(steps=800 if alpha > 2 else 300)
    )
    assert course.distances[0] > 0.1
    assert course.distances[-1] <= 0.01
    if course.log_z is not None:
        wanted = [root(alpha * token_log_probs(base).sum(dim=1)) for base in PROMPTS]
        assert course.log_z.tolist() == pytest.approx(wanted, abs=0.02)


def test_log_z_is_a_free_baseline_of_tb_on_its_own_responses_only():
    sequence = token_log_probs(random_logits(5)).sum(dim=1)
    apart = {}
    for name, mu in (("own", sequence), ("older", S_REF)):
        found = []
        for log_z in (0.0, 3.0):
            logits = sequence.clone().requires_grad_()
            partial = partial_of(logits.log_softmax(0), 2.0, "none")
            balance_loss(partial, torch.full_like(ZERO, log_z), mu.exp(), EVERY, 1.0).loss.backward()
            found.append(logits.grad)
        apart[name] = float((found[0] - found[1]).abs().max())
    assert apart["own"] < 1e-12
    assert apart["older"] > 0.01


@pytest.mark.parametrize(("estimator", "factor"), [(group_log_z, 0.5), (loo_log_z, 1.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_factor_of_an_estimate_is_that_without_lag_as_long_as_w_is_1(estimator, factor, weighted):
    """All pairs of older responses (G = 2) against log Z' at which E_mu[w delta] = 0: (1 - 1/G), and 1."""
    mu, sequence = S_REF, token_log_probs(random_logits(5)).sum(dim=1)
    rule = {"ratio": "seq" if weighted else "none", "clip_epsilon": 0.2}
    weight = importance_weight(sequence, mu, LENGTHS, **rule).weight
    first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(len(RESPONSES))] * 2, indexing="ij"))
    members, groups = torch.stack([first, second], 1).flatten(), torch.arange(len(first)).repeat_interleave(2)
    chance = (mu[first] + mu[second]).exp().repeat_interleave(2)
    gradients = []
    for pairs in (True, False):
        logits = sequence.clone().requires_grad_()
        partial = partial_of(logits.log_softmax(0), 2.0)
        if pairs:
            ones = torch.ones_like(members, dtype=torch.bool)
            log_z = estimator(partial[members], groups, weight[members], ones)
            balance_loss(partial[members], log_z, chance * weight[members], ones, 2.0).loss.backward()
        else:
            calibrated = -(mu.exp() * weight * partial.detach()).sum() / (mu.exp() * weight).sum()
            balance_loss(partial, calibrated.expand_as(partial), mu.exp() * weight, EVERY, 1.0).loss.backward()
        gradients.append(logits.grad)
    gap = float((gradients[0] - factor * gradients[1]).abs().max() / gradients[1].abs().max())
    assert gap > 1e-4 if weighted else gap < 1e-9


def test_the_weight_of_spans_gives_back_the_expectation_of_the_policy():
    """Weights switched in mid-response: (trainer)/(sampler) of every token by whoever wrote it, without a cap. By the
    newest writer alone, as if it had written all, it does not."""
    ways = writers(STRANGERS, "in_flight")[:, 0]  # [5, 63, 6]
    sequence = token_log_probs(random_logits(5)).sum(dim=1)

    def expectation(chances: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = sequence.clone().requires_grad_()
        partial = partial_of(logits.log_softmax(0), 2.0)
        balance_loss(partial, ZERO - 0.7, chances * weight, EVERY, 1.0).loss.backward()
        return logits.grad

    no_cap = {"ratio": "seq", "clip_epsilon": 1e12, "upper_only": True}
    own = expectation(sequence.exp(), torch.ones_like(ZERO))
    for way in ways:
        weight = importance_weight(sequence, way.sum(dim=1), LENGTHS, **no_cap).weight
        torch.testing.assert_close(expectation(way.sum(dim=1).exp(), weight), own, atol=1e-12, rtol=1e-9)
    newest = importance_weight(sequence, STRANGERS[-2][0].sum(dim=1), LENGTHS, **no_cap).weight
    assert (expectation(ways[2].sum(dim=1).exp(), newest) - own).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "lag", "settles"),
    [
        ("la_tb", 4, True),
        ("rl_traj, rewards of the policy", 4, True),
        ("rl_traj, rewards of the sampler", 0, True),
        ("rl_traj, rewards of the sampler", 1, False),
    ],
)
def test_lag_lowers_the_largest_rate_of_rewards_of_the_sampler_alone(kind, lag, settles):
    """At 1.5 / curvature: the limit is 2 where the residual is of the policy, and 2 sin(pi / (4 lag + 2)) where the
    reward is as old as the response, which is 1 at lag 1."""
    best = optimum(S_REF, 4.0, tilts=kind == "la_tb")
    table, gradient_of = logits_of(best).log_softmax(dim=-1), expected_gradient(kind, 4.0, S_REF)
    curvature = largest_curvature(gradient_of, table, best, moves_sampler=kind.endswith("sampler"))
    history = [table + 1e-4 * random_logits(9)]
    for _ in range(200):
        sampler = token_log_probs(history[max(len(history) - 1 - lag, 0)]).sum(dim=-1)
        history.append(history[-1] - 1.5 / curvature * gradient_of(history[-1], sampler))
    first, last = (
        float(total_variation(token_log_probs(each).sum(dim=-1), best)) for each in (history[0], history[-1])
    )
    assert last < first if settles else last > 10 * first


def test_a_clipped_surrogate_rests_at_its_clip_where_the_sampler_never_moves():
    """Trained: rl_traj without a ratio still ends at p_alpha, with PPO's it stays near the sampler."""
    targets = torch.stack([optimum(token_log_probs(base).sum(dim=1), 4.0, tilts=False) for base in PROMPTS])
    ends = {
        ratio: train(gradient("rl_traj", 4.0, (ratio, None)), PROMPTS, targets, "frozen", Training(steps=300))
        for ratio in ("none", "seq")
    }
    assert ends["none"].distances[-1] <= 0.01
    assert ends["seq"].distances[-1] > 0.1


def test_rewards_of_the_sampler_have_no_optimum_where_it_never_moves():
    """Trained: their advantage does not depend on the policy, so nothing stops it."""
    targets = torch.stack([optimum(token_log_probs(base).sum(dim=1), 2.0, tilts=False) for base in PROMPTS])
    setup = gradient("rl_traj", 2.0, ("none", None), rewards_of_sampler=True)
    assert train(setup, PROMPTS, targets, "frozen", Training(steps=300)).distances[-1] > 0.1


def test_dropped_responses_leave_lambda_free():
    """objective.truncated=drop, with lag and without: whatever mass the dropped ones have, there is a lambda at which
    every residual of the kept ones is 0."""
    kept = LENGTHS.max() > LENGTHS
    for mass in (0.7, 0.9):
        energy = 2.0 * S_REF[kept] - math.log(mass)
        tilt = root(energy, LENGTHS[kept])
        best = S_REF.clone()
        best[kept] = energy + math.log(mass) - tilt * LENGTHS[kept]
        best[~kept] = S_REF[~kept].log_softmax(0) + math.log(1.0 - mass)
        logits = best.clone().requires_grad_()
        partial = partial_of(logits.log_softmax(0), 2.0)
        log_z = group_log_z(partial, torch.zeros(len(RESPONSES), dtype=torch.int64), torch.ones_like(ZERO), kept)
        assert float(log_z[0]) == pytest.approx(tilt)
        balance_loss(partial, log_z, torch.ones_like(ZERO), kept, 1.0).loss.backward()
        assert logits.grad.abs().max() < 1e-9


def test_the_benchmark_prints_its_tables(capsys, monkeypatch):
    """At tiny size; what it measures is not looked at. Without `bounds`, which takes a minute."""
    sections = ("optimum", "rivals", "others", "cost", "tied")
    sizes = ("--steps", "3", "--seeds", "1", "--alphas", "2", "--batches", "3")
    monkeypatch.setattr("sys.argv", ["lag", "--only", *sections, *sizes])
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    rows = capsys.readouterr().out.splitlines()
    assert sum(row.startswith("|---") for row in rows) == len(sections)
    assert sum(row.startswith("| 2.0 | la_tb") for row in rows) == 3
