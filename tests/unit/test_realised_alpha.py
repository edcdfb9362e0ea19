"""The realised alpha is exact where the policy has the form, indifferent to what does not matter, honest elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_powerflow.config_file import parse_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.realised_alpha import alpha_reached, realised_alpha
from megatron_powerflow.metrics.reduce import ReductionSettings, reduce_rollouts
from megatron_powerflow.records import ROLLOUT_COLUMNS

NAMES = {"alpha_realised", "alpha_realised_low", "alpha_realised_high", "alpha_realised_r2", "lambda_realised"}


def step(num_prompts: int = 8, num_responses: int = 8, *, seed: int = 0, spread: float = 0.0) -> dict[str, np.ndarray]:
    """Lengths, base log-probs that mostly follow them, prompts. spread: how unequal prompts are, in logarithms."""
    generator = np.random.default_rng(seed)
    prompts = np.repeat(np.arange(num_prompts), num_responses)
    typical = generator.normal(0, 0.4, num_prompts)[prompts]
    lengths = np.exp(generator.normal(5, 0.4, len(prompts)) + typical).round() + 1
    scale = np.exp(generator.normal(0, spread, num_prompts))[prompts]
    reference = -0.3 * lengths + scale * 0.6 * np.sqrt(lengths) * generator.normal(0, 1, len(prompts))
    return {"reference": reference, "lengths": lengths, "prompts": prompts, "added": np.zeros(len(prompts))}


def fit(policy: np.ndarray, given: dict[str, np.ndarray]) -> dict[str, float]:
    return realised_alpha(policy, given["reference"], given["lengths"], given["prompts"], given["added"])


def test_the_untrained_policy_has_alpha_1_and_lambda_0():
    given = step()
    found = fit(given["reference"].copy(), given)
    assert set(found) == NAMES
    for name in ("alpha_realised", "alpha_realised_low", "alpha_realised_high", "alpha_realised_r2"):
        assert found[name] == pytest.approx(1.0, abs=1e-12)
    assert found["lambda_realised"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.5, 2.5, -1.0])
def test_a_tilted_power_gives_its_own_numbers(alpha):
    given = step()
    constant = np.random.default_rng(1).normal(0, 50, 8)[given["prompts"]]
    found = fit(alpha * given["reference"] + 0.3 * given["lengths"] + constant, given)
    assert found["alpha_realised"] == pytest.approx(alpha, abs=1e-9)
    assert found["lambda_realised"] == pytest.approx(-0.3, abs=1e-9)
    assert found["alpha_realised_r2"] == pytest.approx(1.0, abs=1e-9)
    assert found["alpha_realised_high"] - found["alpha_realised_low"] == pytest.approx(0.0, abs=1e-9)
    halves = given | {"prompts": 2 * given["prompts"] + np.arange(64) % 2}  # each group cut in two
    found = fit(alpha * given["reference"] + 0.3 * given["lengths"] + constant, halves)
    assert (found["alpha_realised"], found["lambda_realised"]) == pytest.approx((alpha, -0.3), abs=1e-9)


def test_each_prompt_may_have_its_own_lambda():
    """Lambda is log Z'(q). One lambda for all would be wrong here: it follows the spread of the lengths."""
    given = step()
    longest = np.array([given["lengths"][given["prompts"] == q].std() for q in range(8)])
    lambdas = -longest / longest.mean()
    found = fit(2.5 * given["reference"] - lambdas[given["prompts"]] * given["lengths"], given)
    assert found["alpha_realised"] == pytest.approx(2.5, abs=1e-9)
    assert -2.5 < found["lambda_realised"] < -0.5


@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0])
def test_a_reward_in_the_energy_does_not_pass_for_alpha(kappa):
    """-2 nats a token for some of the responses, more often for the likely ones."""
    given = step(16, 16)
    unboxed = given["reference"] + 0.3 * given["lengths"] > 0
    given["added"] = -2.0 * unboxed * given["lengths"]
    found = fit(3.0 * given["reference"] + kappa * given["added"], given)
    assert found["alpha_realised"] == pytest.approx(3.0, abs=1e-8)
    given["added"] = np.zeros_like(given["added"])
    without = fit(3.0 * given["reference"] - 2.0 * unboxed * given["lengths"], given)
    assert abs(without["alpha_realised"] - 3.0) > 0.2  # there was something to get wrong


def test_a_reward_that_only_some_prompts_have_is_seen():
    given = step(16, 16)
    unboxed = (given["reference"] + 0.3 * given["lengths"] > 0) & (given["prompts"] < 8)
    given["added"] = -2.0 * unboxed * given["lengths"]
    assert fit(3.0 * given["reference"] + 0.5 * given["added"], given)["alpha_realised"] == pytest.approx(3.0, abs=1e-8)


def test_neither_order_nor_names_nor_constants_of_prompts_matter():
    given = step()
    generator = np.random.default_rng(2)
    policy = 2 * given["reference"] + generator.normal(0, 3, 64)
    found = fit(policy, given)
    order = generator.permutation(64)
    shuffled = {name: column[order] for name, column in given.items()}
    assert fit(policy[order], shuffled) == pytest.approx(found)
    shuffled["prompts"] = 1000.0 - 3 * shuffled["prompts"]
    shuffled["reference"] = shuffled["reference"] + 7 * shuffled["prompts"]
    assert fit(policy[order] + 40 * shuffled["prompts"], shuffled) == pytest.approx(found, rel=1e-6)


def test_prompts_without_spread_add_nothing():
    given = step()
    policy = 2 * given["reference"] + np.random.default_rng(3).normal(0, 3, 64)
    found = fit(policy, given)
    # eight copies of one response; eight responses whose base log-prob is their length's; two responses
    more = {
        "reference": np.concatenate([np.full(8, -40.0), -0.3 * np.arange(8), [-3.0, -50.0]]),
        "lengths": np.concatenate([np.full(8, 90.0), np.arange(8.0), [10.0, 20.0]]),
        "prompts": np.concatenate([np.full(8, 8), np.full(8, 9), [10, 10]]),
        "added": np.zeros(18),
    }
    both = {name: np.concatenate([given[name], more[name]]) for name in given}
    odd = np.random.default_rng(4).normal(0, 100, 18)
    assert fit(np.concatenate([policy, odd]), both) == pytest.approx(found)
    assert fit(odd, more) == {}


@pytest.mark.parametrize(("squares", "told"), [(1.2e-6, True), (0.8e-6, False)])
def test_a_spread_is_taken_per_degree_of_freedom(squares, told):
    """Three responses, constant and slope taken out: one degree is left, and .001 nats are asked of it."""
    beside = np.array([1.0, -2.0, 1.0]) * np.sqrt(squares / 6)
    given = {
        "reference": beside - [0.3, 0.6, 0.9],
        "lengths": np.array([1.0, 2, 3]),
        "prompts": np.zeros(3),
        "added": np.zeros(3),
    }
    assert ("alpha_realised" in fit(2 * given["reference"], given)) == told


def test_what_cannot_be_told_apart_is_not_told():
    given = step()
    given["added"] = given["reference"] * 2
    assert fit(given["reference"] * 3, given) == {}
    given["added"] = np.full(64, np.nan)
    assert fit(given["reference"], given) == {}


def test_one_prompt_has_no_interval():
    given = step(1, 64)
    found = fit(2 * given["reference"] + np.random.default_rng(5).normal(0, 1, 64), given)
    assert set(found) == NAMES - {"alpha_realised_low", "alpha_realised_high"}
    assert found["alpha_realised"] == pytest.approx(2.0, abs=0.2)


def test_a_policy_of_another_form_is_seen_as_such():
    """Log-probs that have nothing to do with the base model's but through length."""
    given = step(32, 16)
    found = fit(-0.2 * given["lengths"] + np.random.default_rng(6).normal(0, 8, 512), given)
    assert found["alpha_realised_r2"] < 0.05
    assert found["alpha_realised_low"] < 0 < found["alpha_realised_high"]


@pytest.mark.parametrize(
    ("num_prompts", "num_responses", "spread", "least", "most"),
    [(2, 16, 0.0, 0.92, 0.98), (8, 8, 0.0, 0.92, 0.98), (32, 16, 0.0, 0.92, 0.98), (32, 16, 1.0, 0.92, 0.995)],
)
def test_the_interval_holds_the_truth_as_often_as_it_says(num_prompts, num_responses, spread, least, most):
    """Noise of each response, and a power of each prompt's own around 2.5: what a common alpha leaves over is alike
    within a prompt. With unequal prompts the interval may hold it oftener than 95 %, never much less often."""
    held = 0
    for trial in range(600):
        given = step(num_prompts, num_responses, seed=trial, spread=spread)
        generator = np.random.default_rng([9, trial])
        alpha = 2.5 + generator.normal(0, 0.3, num_prompts)[given["prompts"]]
        tilt = generator.normal(1, 0.3, num_prompts)[given["prompts"]] * given["lengths"]
        noise = generator.normal(0, 0.3, len(tilt)) * np.sqrt(given["lengths"])
        found = fit(alpha * given["reference"] + tilt + noise, given)
        held += found["alpha_realised_low"] <= 2.5 <= found["alpha_realised_high"]
    assert least <= held / 600 <= most


def rows(policy, reference, lengths, **columns) -> np.ndarray:
    values = {name: np.zeros(len(policy)) for name in ROLLOUT_COLUMNS}
    values |= {
        "rollout_index": np.arange(len(policy)),
        "kept": np.ones(len(policy)),
        "max_log_prob": np.zeros(len(policy)),
    }
    values |= {
        "old_sequence_log_prob": policy,
        "ref_sequence_log_prob": reference,
        "num_response_tokens": lengths,
    } | columns
    return np.stack([np.asarray(values[name], dtype=float) for name in ROLLOUT_COLUMNS], axis=1)


def test_a_step_is_reduced_with_the_lengths_and_energies_of_its_target():
    """psi -0.5 a token under a tilt cap; a policy gradient's `reward` is the log-ratio itself and no energy."""
    given = step(4, 16)
    counted = np.minimum(given["lengths"], 150)
    psi = np.where(np.arange(64) % 3 == 0, -0.5, 0.0)
    policy = 4 * given["reference"] + 1.5 * counted + 0.6 * 4 * psi * counted
    target = ReductionSettings(16, 1000, alpha=4.0, tilt_cap=150, has_tilt=True, energy_per_token=True)
    found = reduce_rollouts(rows(policy, given["reference"], given["lengths"], psi=psi), target)
    assert found["alpha_realised"] == pytest.approx(4.0, abs=1e-8)
    assert found["lambda_realised"] == pytest.approx(-1.5, abs=1e-8)
    missing = {"residual": np.full(64, np.nan), "reward": 4 * given["reference"] - policy}
    target = ReductionSettings(16, 1000, alpha=4.0, has_tilt=True, energy_per_token=True)
    policy = 2 * given["reference"] + np.random.default_rng(7).normal(0, 1, 64)
    found = reduce_rollouts(rows(policy, given["reference"], given["lengths"], **missing), target)
    assert found["alpha_realised"] == pytest.approx(2.0, abs=0.2)
    assert 0.5 < found["alpha_realised_r2"] < 1 - 1e-6
    rival = reduce_rollouts(rows(policy, given["reference"], given["lengths"]), ReductionSettings(16, 1000))
    assert rival["alpha_realised"] == pytest.approx(2.0, abs=0.2)  # what a rival has come to, though it asks for none


def test_log_probs_that_are_no_numbers_take_no_part():
    given = step()
    policy = 2 * given["reference"]
    policy[:3] = np.nan, np.inf, -np.inf
    assert fit(policy, given)["alpha_realised"] == pytest.approx(2.0)


def lines(alphas, r2=0.9) -> list[dict[str, float]]:
    return [{} if alpha is None else {"alpha_realised": alpha, "alpha_realised_r2": r2} for alpha in alphas]


def test_reached_by_the_median_of_ten_steps_and_not_by_one_of_them():
    rising = np.linspace(1, 3, 41)
    first = next(n for n in range(42) if alpha_reached(lines(rising[:n]), 2.0))
    assert np.median(rising[first - 10 : first]) >= 2.0 > np.median(rising[first - 11 : first - 1])
    assert alpha_reached(lines(1.5 - rising / 2)[:first], 0.5) is not None  # seen from 1, downwards
    assert alpha_reached(lines([2.0] * 10), 2.0) is not None  # at it, not beyond
    assert alpha_reached(lines([0.5] * 10), 0.5) is not None
    assert alpha_reached(lines([3.0] * 10 + [1.0] * 10), 2.0) is None  # the last ten
    assert alpha_reached(lines([1.2] * 30 + [900.0] * 4), 2.0) is None
    assert alpha_reached(lines([3.0] * 9), 2.0) is None
    assert alpha_reached(lines([3.0] * 4 + [None] * 6), 2.0) is None
    assert alpha_reached(lines([0.1] * 20, r2=0.2), 0.5) is None  # a collapse shows some power too
    said = alpha_reached(lines([3.0] * 4 + [None] * 3 + [2.5] * 4), 2.0)
    assert "realised alpha 2.5" in said
    assert "run.stop_at_alpha=2" in said


MINIMAL = {"model": {"hf_path": "m"}, "prompts": {"path": "p"}, "run": {"output_dir": "o"}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["run.stop_at_alpha=5"], ["run.stop_at_alpha=5", "objective.alpha=4", "above 1, up to 4"]),
        (["run.stop_at_alpha=0.7"], ["above 1, up to 4"]),
        (["run.stop_at_alpha=1"], ["above 1, up to 4"]),
        (["run.stop_at_alpha=2", "objective.alpha=0.5"], ["from 0.5, below 1"]),
        (["run.stop_at_alpha=0.4", "objective.alpha=0.5"], ["from 0.5, below 1"]),
        (["run.stop_at_alpha=2", "objective.preset=flow_rl"], ["nothing to reach; remove it"]),
        (["run.stop_at_alpha=2", "objective.preset=grpo"], ["no power of the base model; remove it"]),
        (["run.stop_at_alpha=2", "objective.preset=tb_token_target"], ["no power of the base model; remove it"]),
        (["run.stop_at_alpha=2", "rollout.responses_per_prompt=2"], ["at least 3 of them; raise it"]),
        (["run.stop_at_alpha=-2"], ["run.stop_at_alpha=-2", "greater than 0"]),
    ],
)
def test_an_alpha_that_is_never_reached_is_refused(settings, words):
    with pytest.raises(UserError) as caught:
        parse_config(MINIMAL, settings)
    (line,) = caught.value.violations
    for word in words:
        assert word in line


@pytest.mark.parametrize(("alpha", "stop_at"), [(4.0, 4.0), (4.0, 1.5), (0.5, 0.5), (0.5, 0.9)])
def test_an_alpha_on_the_way_is_accepted(alpha, stop_at):
    config = parse_config(MINIMAL, [f"objective.alpha={alpha}", f"run.stop_at_alpha={stop_at}"])
    assert config.run.stop_at_alpha == stop_at
