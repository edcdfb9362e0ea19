"""The test on lengths by hand: windows, standard errors, and what counts as gross."""

from __future__ import annotations

import math

import pytest

from megatron_powerflow.metrics.length_shift import LOG_LENGTH, TRUNCATED, Shift, gross_shift, shift, windows


def lines(values, *, error=0.1, names=LOG_LENGTH, num_prompts=41.0) -> list[dict[str, float]]:
    return [{"num_prompts": num_prompts, names[0]: value, names[1]: error} for value in values]


def test_windows_have_forty_degrees_of_freedom_and_twice_that():
    """One step of 41 prompts is enough, of 11 it takes four, of 2 forty."""
    assert windows(41) == windows(1000) == (10, 5)
    assert windows(11) == (10, 5)
    assert windows(5) == (20, 10)
    assert windows(2) == (80, 40)


def test_the_error_of_a_difference_by_hand():
    """Ten first steps 4 and 6 in turns: variance 10/9, above the squared error .01, also of the five recent ones."""
    found = shift(lines([4, 6] * 5 + [100] + [9] * 5), LOG_LENGTH)
    assert (found.before, found.now, found.change) == (5, 9, 4)
    assert found.error == pytest.approx(math.sqrt(10 / 9 / 10 + 10 / 9 / 5))


def test_the_error_of_quiet_steps_is_that_of_their_means():
    found = shift(lines([5] * 10, error=0.3) + lines([7] * 5, error=0.2), LOG_LENGTH)
    assert found.error == pytest.approx(math.sqrt(0.09 / 10 + 0.04 / 5))
    assert shift(lines([5] * 14), LOG_LENGTH) is None
    assert shift([{"num_prompts": 4.0, "response_log_length_mean": 5.0}] * 30, LOG_LENGTH) is None


@pytest.mark.parametrize(("change", "significant"), [(5.1, True), (-5.1, True), (4.9, False), (-4.9, False)])
def test_five_standard_errors_are_significant_up_and_down(change, significant):
    assert Shift(2.0, 2.0 + change, 1.0).significant == significant


def test_gross_is_a_half_more_cut_or_a_length_four_times_another():
    """From the first step alone, whatever the others of the first ten are."""

    def found(names, before, now):
        return gross_shift(lines([before] + [7] * 9 + [now] * 5, error=0.01, names=names), names)

    assert found(TRUNCATED, 0.1, 0.65).change == pytest.approx(0.55)
    assert found(TRUNCATED, 0.1, 0.55) is None
    assert found(LOG_LENGTH, 5.0, 5.0 + math.log(4.1)).before == 5
    assert found(LOG_LENGTH, 5.0, 5.0 - math.log(4.1)).change == pytest.approx(-math.log(4.1))
    assert found(LOG_LENGTH, 5.0, 5.0 + math.log(3.9)) is None
    assert gross_shift(lines([5] + [9] * 5, error=1.0), LOG_LENGTH) is None  # not significant
