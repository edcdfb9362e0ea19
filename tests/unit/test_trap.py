"""On rollouts of a known target lambda is right, the margin has its sign, and what is worth nothing is not said."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from megatron_powerflow.metrics.reduce import ReductionSettings, reduce_rollouts
from megatron_powerflow.metrics.tilt import prompt_tilts
from megatron_powerflow.metrics.trap import trap_margin
from megatron_powerflow.objective.presets import PRESETS
from megatron_powerflow.objective.trajectory_balance import partial_residual
from megatron_powerflow.records import ROLLOUT_COLUMNS
from tests.unit.test_laws import LENGTHS, RESPONSES, base_log_probs

ALPHA = 4.0
GROUP = 16
LIMIT = 3072


def root(log_terms: np.ndarray, lengths: np.ndarray) -> float:
    """lambda with sum exp(log_terms - lambda n) = 1."""
    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        above = np.logaddexp.reduce(log_terms - middle * lengths) > 0
        low, high = (middle, high) if above else (low, middle)
    return low


def table(**columns) -> np.ndarray:
    """Rows of rollouts of groups of 16 that are as given, kept and without a loop where nothing else is said."""
    num = len(columns["old_sequence_log_prob"])
    everything = dict.fromkeys(ROLLOUT_COLUMNS, np.zeros(num)) | {"rollout_index": np.arange(num), "kept": np.ones(num)}
    everything |= {name: np.full(num, np.nan) for name in ("loop_tokens", "loop_nats", "entry_nats", "log_z")}
    everything |= {"weight": np.ones(num)} | {name: np.broadcast_to(values, num) for name, values in columns.items()}
    return np.stack([everything[name] for name in ROLLOUT_COLUMNS], axis=1)


def reported(rows: np.ndarray, alpha: float, *, tilt_cap: int | None = None, group: int = GROUP) -> dict[str, float]:
    values = reduce_rollouts(rows, ReductionSettings(group, LIMIT, alpha, tilt_cap, has_tilt=True))
    return {name: value for name, value in values.items() if name.startswith("trap_")}


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("psi", [0.0, -0.5])
@pytest.mark.parametrize("reward", [0.0, 0.7])
@pytest.mark.parametrize("cap", [None, 3])
def test_law_on_samples_of_the_target_the_estimate_is_lambda(alpha, psi, reward, cap):
    """Enumerated: 121 responses, two thirds of them unboxed, a third rewarded. Whatever is drawn, lambda is exact; and
    it is the log Z' at which every residual of the loss is 0."""
    ref, lengths = base_log_probs().numpy(), LENGTHS.numpy()
    counted = lengths if cap is None else np.minimum(lengths, cap)
    places = np.arange(len(RESPONSES))
    psis, rewards = np.where(places % 3 > 0, psi, 0.0), np.where(places % 3 == 1, reward, 0.0)
    energy = alpha * ref + (alpha * psis + rewards) * counted
    lam = root(energy, counted)
    log_target = energy - lam * counted
    assert np.exp(log_target).sum() == pytest.approx(1.0, abs=1e-9)
    partial = partial_residual(
        *map(torch.from_numpy, (log_target, ref, counted, psis)), alpha, reward=torch.from_numpy(rewards)
    )
    assert torch.allclose(partial, torch.full_like(partial, -lam))
    drawn = np.random.default_rng(0).choice(places, size=4 * GROUP, p=np.exp(log_target) / np.exp(log_target).sum())
    columns = {
        "old_sequence_log_prob": log_target[drawn],
        "ref_sequence_log_prob": ref[drawn],
        "num_response_tokens": lengths[drawn],
        "psi": psis[drawn],
        "reward": rewards[drawn],
        "log_z": lam + 0.25,
    }
    found = reported(table(**columns), alpha, tilt_cap=cap)
    assert found["trap_lambda"] == pytest.approx(lam, abs=1e-9)
    assert found["trap_lambda_mean"] == pytest.approx(lam, abs=1e-9)
    assert found["trap_lambda_std"] == pytest.approx(0.0, abs=1e-9)
    assert found["trap_log_z_gap"] == pytest.approx(0.25, abs=1e-9)
    assert found["trap_effective_samples"] == pytest.approx(GROUP)


class Sample(NamedTuple):
    """rows: of exact samples; lam: [prompts] the lambda without loops of each."""

    rows: np.ndarray
    lam: np.ndarray


def exact_samples(
    fixed_point: np.ndarray, *, unboxed: float = 0.0, loops: float = 0.0, seed: int = 0, group: int = GROUP
) -> Sample:
    """Rollouts of each prompt's exact target at alpha 4, psi -.5, `fixed_point` [prompts] being its own lambda.

    Ordinary responses have 200 to 900 tokens, each of its own mass; `unboxed` of them have no box. The share `loops`
    of the mass is one loop that fills the limit: the base model pays 5 nats to enter it, the rest evenly.
    """
    rng, num = np.random.default_rng(seed), len(fixed_point) * group
    lam = np.repeat(fixed_point, group)
    looping = rng.random(num) < loops
    lengths = np.where(looping, LIMIT, rng.integers(200, 901, num)).astype(float)
    psi = np.where(~looping & (rng.random(num) < unboxed), -0.5, 0.0)
    log_mass = np.where(looping, np.log(max(loops, 1e-300)), -rng.uniform(1.5, 2.0, num) * lengths)
    ref = (log_mass + (lam - ALPHA * psi) * lengths) / ALPHA
    rows = table(
        rollout_index=np.arange(num),
        old_sequence_log_prob=log_mass,
        ref_sequence_log_prob=ref,
        num_response_tokens=lengths,
        psi=psi,
        log_z=lam,
        loop_tokens=np.where(looping, lengths, np.nan),
        loop_nats=np.where(looping, (-ref - 5.0) / LIMIT, np.nan),
        entry_nats=np.where(looping, 5.0, np.nan),
    )
    ordinary = np.arange(200.0, 901.0)  # what is left to them must be all: (1 - loops) mean exp(shift n) = 1
    shift = -root(np.full(len(ordinary), np.log((1 - loops) / len(ordinary))), ordinary)
    return Sample(rows, fixed_point - shift)


def spread_lambdas(seed: int = 0) -> np.ndarray:
    """[32] around -1.5, spread .3."""
    return -1.5 + 0.3 * np.random.default_rng([seed, 1]).standard_normal(32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("unboxed", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("loops", [0.0, 0.01, 0.5])
def test_known_targets_with_psi_a_spread_and_loops(unboxed, loops, seed):
    """512 rollouts. The pooled root of old gave -1.01 for the spread, +.49 for one percent unboxed."""
    rows, lam = exact_samples(spread_lambdas(seed), unboxed=unboxed, loops=loops, seed=seed)
    found = reported(rows, ALPHA)
    assert found["trap_lambda"] == pytest.approx(np.median(lam), abs=0.02)
    assert found["trap_lambda_mean"] == pytest.approx(lam.mean(), abs=0.02)
    assert found["trap_lambda_std"] == pytest.approx(lam.std(), abs=0.02)
    assert found["trap_effective_samples"] == pytest.approx(GROUP * (1 - loops), rel=0.2)
    if loops:  # a target that is half loop pays for it, one that is a hundredth loop does not
        exact = np.log(loops) + LIMIT * (spread_lambdas(seed) - lam)[0]
        assert np.sign(found["trap_margin"]) == np.sign(exact) == (1 if loops == 0.5 else -1)
        assert found["trap_margin"] == pytest.approx(exact, abs=1.0)
    else:
        assert "trap_margin" not in found


@pytest.mark.parametrize("loops", [0.01, 0.5])
def test_at_the_fixed_points_own_lambda_no_loop_ever_pays(loops):
    """The margin there is the loop's log-probability: the formula needs the lambda without loops."""
    rows, lam = exact_samples(np.full(32, -1.5), loops=loops)
    looping = np.isfinite(rows[:, ROLLOUT_COLUMNS.index("loop_nats")])
    nats, entry = (rows[looping, ROLLOUT_COLUMNS.index(name)] for name in ("loop_nats", "entry_nats"))
    arguments = {"alpha": ALPHA, "max_response_tokens": LIMIT, "tilt_cap": None}
    assert trap_margin(nats, entry, tilt=1.5, **arguments) == pytest.approx(np.log(loops))
    assert (trap_margin(nats, entry, tilt=-lam[0], **arguments) > 0).all() == (loops == 0.5)


def test_a_loop_without_a_box_pays_its_psi():
    """alpha psi = -2 nats on every token: more than the tilt gives."""
    arguments = {"alpha": 4.0, "tilt": 1.5, "max_response_tokens": 3072, "tilt_cap": None}
    assert trap_margin(0.01, 5.0, **arguments) > 0 > trap_margin(0.01, 5.0, **arguments, bonus=4.0 * -0.5)


def test_the_loops_of_a_step_have_their_own_psi():
    """alpha psi = -2 nats on each of 3,072 tokens; lambda is of the others."""
    rows, _ = exact_samples(np.full(32, -1.5), loops=0.5)
    looping = np.isfinite(rows[:, ROLLOUT_COLUMNS.index("loop_nats")])
    boxed = reported(rows, ALPHA)
    rows[looping, ROLLOUT_COLUMNS.index("psi")] = -0.5
    unboxed = reported(rows, ALPHA)
    assert unboxed["trap_margin"] == pytest.approx(boxed["trap_margin"] - 2.0 * LIMIT)
    assert unboxed["trap_lambda"] == boxed["trap_lambda"]


def test_a_tilt_cap_beyond_the_limit_is_none():
    arguments = {"alpha": 4, "tilt": 1.57, "max_response_tokens": 40}
    assert trap_margin(0.1, 5.0, **arguments, tilt_cap=99) == trap_margin(0.1, 5.0, **arguments, tilt_cap=None)


def test_the_margin_is_that_of_the_miniature():
    """N (|lambda| - alpha r) - alpha c at N = 40, alpha 4, |lambda| 1.57: cheap loops are trapped, dear ones safe."""
    nats, entry = -np.log([0.97, 0.90, 0.85, 0.75]), np.array([5.0, 5.75, 6.0, 5.75])
    margins = trap_margin(nats, entry, alpha=4, tilt=1.57, max_response_tokens=40, tilt_cap=None)
    assert margins == pytest.approx([57.9 - 20, 45.9 - 23, 36.8 - 24, 16.8 - 23], abs=0.1)
    capped = trap_margin(nats, entry, alpha=4, tilt=1.57, max_response_tokens=40, tilt_cap=20)
    assert capped == pytest.approx([20 * 1.57 - 4 * (40 * r + c) for r, c in zip(nats, entry, strict=True)])
    assert (capped < margins).all()
    assert capped[1] < 0 < margins[1]  # a tilt cap of half the limit disarms the trap
    shorter = trap_margin(nats, entry, alpha=4, tilt=1.57, max_response_tokens=15, tilt_cap=None)
    assert shorter[1] < 0  # so does a lower limit


def test_the_margin_is_of_half_the_loops_and_not_of_the_cheapest():
    """Nine loops at .5 nats a token and one at .01, which alone would pay: 3072 (1.5 - 4 * .5) - 20."""
    rows, _ = exact_samples(np.full(32, -1.5))
    for number in range(10):
        cost = 0.01 if number == 4 else 0.5
        for name, value in (("loop_tokens", LIMIT), ("loop_nats", cost), ("entry_nats", 5.0)):
            rows[number * GROUP, ROLLOUT_COLUMNS.index(name)] = value
    found = reported(rows, ALPHA)
    assert found["trap_loop_nats"] == 0.5
    # a sixteenth of these prompts' mass is left out: their lambda is lower by about 1e-4
    assert found["trap_margin"] == pytest.approx(3072 * (1.5 - 2.0) - 20, abs=1.0)


def test_a_repetition_below_a_fifth_of_the_limit_is_no_loop():
    rows, _ = exact_samples(np.full(4, -1.5))
    for name, value in (("loop_tokens", 614), ("loop_nats", 0.01), ("entry_nats", 5.0)):
        rows[:, ROLLOUT_COLUMNS.index(name)] = value
    found = reduce_rollouts(rows, ReductionSettings(GROUP, LIMIT, ALPHA, None, has_tilt=True))
    assert found["loop_fraction"] == 0.0
    assert "trap_margin" not in found
    assert found["trap_lambda"] == pytest.approx(-1.5)


def test_what_rests_on_one_rollout_of_a_prompt_is_not_said():
    """30 nats of noise in S: one term is the whole sum. Half of the prompts are enough, a third is not."""
    rows, lam = exact_samples(spread_lambdas(), loops=0.1)
    noise = 30.0 * np.random.default_rng(0).standard_normal(len(rows))
    place = ROLLOUT_COLUMNS.index("old_sequence_log_prob")
    for spoilt, silent in ((0, False), (16, False), (21, True), (32, True)):
        worse = rows.copy()
        worse[: spoilt * GROUP, place] += noise[: spoilt * GROUP]
        found = reported(worse, ALPHA)
        assert ("trap_lambda" not in found) == silent
        assert ("trap_margin" not in found) == silent
        assert "trap_loop_nats" in found
        assert found["trap_effective_samples"] == pytest.approx(14.4 - 13.2 * spoilt / 32, abs=0.8)
        if not silent:
            assert found["trap_lambda"] == pytest.approx(np.median(lam[spoilt:]), abs=0.1)


def test_dropped_rollouts_are_part_of_the_group_and_not_of_the_sum():
    """Cut responses that are dropped hold a quarter of the policy's mass: the target is over the others alone."""
    rows, _ = exact_samples(np.full(8, -1.5))
    rows[::4, ROLLOUT_COLUMNS.index("kept")] = 0.0
    rows[::4, ROLLOUT_COLUMNS.index("ref_sequence_log_prob")] = 1e6
    shift = -root(np.full(701, np.log(0.75 / 701)), np.arange(200.0, 901.0))
    assert reported(rows, ALPHA)["trap_lambda"] == pytest.approx(-1.5 - shift, abs=1e-4)


def test_a_step_of_loops_alone_says_nothing_of_lambda():
    rows, _ = exact_samples(np.full(4, -1.5), loops=1.0 - 1e-12)
    assert reported(rows, ALPHA) == pytest.approx(
        {"trap_effective_samples": 0.0, "trap_loop_nats": 1.5 / 4 - 5 / LIMIT, "trap_entry_nats": 5.0}, abs=1e-9
    )


@pytest.mark.parametrize("lam", [-200.0, -1e-3, 0.0, 35.0])
def test_the_root_is_found_wherever_it_is(lam):
    lengths = np.arange(1.0, 9.0)
    tilts = prompt_tilts(lam * lengths - lengths, -lengths, lengths, np.full(8, 3), np.full(8, True))
    assert tilts.prompt.tolist() == [3]
    assert tilts.lam == pytest.approx([lam], abs=1e-12)
    assert tilts.effective == pytest.approx([8.0])


def test_the_margin_is_estimated_where_the_fixed_point_has_a_tilt_and_nowhere_else():
    """p_base^alpha exp(-lambda n) is where these end (tests/distributed/test_exact_optimum.py)."""
    assert {name for name, form in PRESETS.items() if form.tilts} == {"la_tb", "tb_token_score", "flow_rl", "rl_token"}


def test_the_reward_of_a_policy_gradient_is_no_energy():
    """rl_token has the target of la_tb; its reward is the log-ratio of target and policy, and its residual is none."""
    ref, lengths = base_log_probs().numpy(), LENGTHS.numpy()
    lam = root(ALPHA * ref, lengths)
    log_probs = ALPHA * ref - lam * lengths
    drawn = np.random.default_rng(3).choice(len(ref), size=8 * GROUP, p=np.exp(log_probs))
    rows = table(
        old_sequence_log_prob=log_probs[drawn],
        ref_sequence_log_prob=ref[drawn],
        num_response_tokens=lengths[drawn].astype(float),
        residual=np.nan,
        reward=(ALPHA * ref[drawn] - log_probs[drawn]) / lengths[drawn],
    )
    assert reported(rows, ALPHA)["trap_lambda"] == pytest.approx(lam, abs=1e-6)
