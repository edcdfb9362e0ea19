"""Shares of n-grams, by hand."""

from __future__ import annotations

import pytest

from megatron_powerflow.metrics.repetition import distinct_share, repeated_share


def test_shares_by_hand():
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 - 4 / 5)
    assert repeated_share([1, 2]) == 0.0
    assert distinct_share([[1, 2, 3], [1, 2, 4]], 2) == pytest.approx(3 / 4)
    assert distinct_share([[1], [2]], 2) == 0.0
