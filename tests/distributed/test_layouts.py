"""Law 16: the table of benchmarks/layouts.py, those rows that have an axis, or two axes meeting, for the first time.

Left out for time: rows that others contain (TP2 in TP2 + SP, ...); `python -m benchmarks.layouts` has them all.
"""

from __future__ import annotations

import pytest

from benchmarks.layouts import ROWS, Comparison

CONTAINED = {"TP2", "PP2", "DP2", "TP2 x PP2", "TP2 x CP2", "PP2 x DP2", "packed, DP2", "packed, CP2", "experts: EP2"}


@pytest.fixture(scope="module")
def comparison(gloo, tmp_path_factory) -> Comparison:
    return Comparison(gloo, tmp_path_factory.mktemp("layouts"))


# where a new axis meets the others first; the other rows are slow together; what test_experts.py holds too is long
QUICK = {"TP2 + SP", "PP2 x CP2", "CP2 x DP2, distributed optimizer"}
MARKS = dict.fromkeys(QUICK, ()) | {"experts: TP2 + SP x EP2": pytest.mark.long}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=MARKS.get(row.name, pytest.mark.slow))
        for row in ROWS[1:]
        if row.name not in CONTAINED
    ],
)
def test_three_steps_of_saved_rollouts_are_the_same_under_every_layout(comparison, row):
    """Loss within 1e-5 relative, gradient norm within 1e-4, change of the parameters within 1e-3, fp32."""
    compared = comparison.row(row)
    assert compared.agrees, compared
    assert compared.change_norm > 1e-3  # something moved
