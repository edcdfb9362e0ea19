"""The alarm rings when responses lengthen out of hand, and not for noise or for the lengthening of the first steps."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_powerflow.metrics.alarm import length_alarm


def lines(truncated, p95, num_rollouts=256):
    return [
        {"truncated_fraction": t, "response_length_p95": p, "num_rollouts": num_rollouts}
        for t, p in zip(truncated, p95, strict=True)
    ]


def first_ring(history) -> int | None:
    return next((n for n in range(len(history) + 1) if length_alarm(history[:n])), None)


def test_a_collapse_rings_before_a_tenth_is_cut():
    """A share that doubles each 5 steps from 1 %, as a loop takes over."""
    share = [0.01] * 60 + [min(1.0, 0.01 * 2 ** (i / 5)) for i in range(1, 60)]
    ring = first_ring(lines(share, [24] * 119))
    assert ring > 60
    assert share[ring - 1] < 0.1


def test_a_long_tail_rings_too():
    assert first_ring(lines([0.0] * 100, [24] * 50 + [36] * 50)) in range(51, 56)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_noise_does_not_ring(share):
    generator = np.random.default_rng(0)
    truncated = generator.binomial(256, share, size=500) / 256
    assert first_ring(lines(truncated, generator.normal(24, 1, size=500))) is None


def test_too_few_steps_say_nothing():
    assert length_alarm([]) is None
    assert length_alarm(lines([0] * 10 + [1] * 4, [10] * 10 + [40] * 4)) is None
