"""Law 16: the table of benchmarks/layouts.py, every row of it."""

from __future__ import annotations

import pytest

from benchmarks.layouts import ROWS, Comparison


@pytest.fixture(scope="module")
def comparison(gloo, tmp_path_factory) -> Comparison:
    return Comparison(gloo, tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row.name)
def test_three_steps_of_saved_rollouts_are_the_same_under_every_layout(comparison, row):
    """Loss within 1e-5 relative, gradient norm within 1e-4, change of the parameters within 1e-3, fp32."""
    compared = comparison.row(row)
    assert compared.agrees, compared
    assert compared.change_norm > 1e-3  # something moved
