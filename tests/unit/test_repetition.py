"""Loops are found where they are, cost what the base model says, and the margin is the rule's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_powerflow.metrics.repetition import (
    distinct_n,
    estimate_tilt,
    find_loop,
    repeated_share,
    trap_margin,
)
from megatron_powerflow.presets import PRESETS


def test_a_loop_of_one_token_by_hand():
    """5 9 then seven 4s: the first costs 5 nats, the others .1 each: entry 4.9 beyond the loop's own rate."""
    tokens = np.array([5, 9, 4, 4, 4, 4, 4, 4, 4, 2])
    log_probs = np.array([-1.0, -2.0, -5.0, *[-0.1] * 6, -3.0])
    loop = find_loop(tokens, log_probs)
    assert loop.num_tokens == 7
    assert loop.nats == pytest.approx(0.1)
    assert loop.entry_nats == pytest.approx(4.9)


def test_a_loop_of_three_tokens_by_hand():
    tokens = np.array([8, 1, 2, 3, 1, 2, 3, 1, 2, 3, 7])
    log_probs = np.array([-1, -2, -2, -2, *[-0.5] * 6, -1.0])
    loop = find_loop(tokens, log_probs)
    assert (loop.num_tokens, loop.nats, loop.entry_nats) == (9, pytest.approx(0.5), pytest.approx(4.5))


@pytest.mark.parametrize(
    "tokens", [[1], [1, 2, 3, 4, 5, 6], [1, 1, 2, 2, 3, 3, 4, 4], [1, 1, 1, 1, 1], [1, 2, 1, 2, 3]]
)
def test_ordinary_responses_have_no_loop(tokens):
    assert find_loop(np.array(tokens), np.full(len(tokens), -1.0)) is None


def test_the_margin_is_that_of_the_miniature():
    """N (|lambda| - alpha r) - alpha c at N = 40, alpha 4, |lambda| 1.57: cheap loops are trapped, dear ones safe."""
    nats, entry = -np.log([0.97, 0.90, 0.85, 0.75]), np.array([5.0, 5.75, 6.0, 5.75])
    margins = trap_margin(nats, entry, alpha=4, tilt=1.57, max_response_tokens=40, tilt_cap=None)
    assert margins == pytest.approx([57.9 - 20, 45.9 - 23, 36.8 - 24, 16.8 - 23], abs=0.1)
    capped = trap_margin(nats, entry, alpha=4, tilt=1.57, max_response_tokens=40, tilt_cap=20)
    assert (capped < margins).all()
    assert capped[1] < 0 < margins[1]  # a tilt cap of half the limit disarms the trap
    shorter = trap_margin(nats, entry, alpha=4, tilt=1.57, max_response_tokens=15, tilt_cap=None)
    assert shorter[1] < 0  # so does a lower limit


def test_the_tilt_is_lambda_on_exact_samples():
    """Three responses of a known distribution, alpha 2: sum p^2 exp(tilt n) = 1 by bisection, against importance
    sampling from p itself with counts that are exactly proportional."""
    p, lengths = np.array([0.5, 0.3, 0.2]), np.array([1.0, 2.0, 3.0])
    rows = np.repeat(np.arange(3), [5, 3, 2])
    tilt = estimate_tilt(np.log(p)[rows], np.log(p)[rows], lengths[rows], 2.0)
    assert (p**2 * np.exp(tilt * lengths)).sum() == pytest.approx(1.0, abs=1e-9)
    assert tilt > 0
    flat = estimate_tilt(np.log(p)[rows], np.log(p)[rows], lengths[rows], 1.0)
    assert flat == pytest.approx(0.0, abs=1e-9)  # law 2: lambda = 0 at alpha 1


def test_shares_by_hand():
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repeated_share([1, 2]) == 0.0
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_n([[1], [2]], 2) == 0.0


def test_the_margin_is_estimated_where_the_fixed_point_has_a_tilt_and_nowhere_else():
    """p_base^alpha exp(-lambda n) is where these end (tests/distributed/test_exact_optimum.py)."""
    assert {name for name, form in PRESETS.items() if form.tilts} == {"la_tb", "tb_token_score", "flow_rl", "rl_token"}
