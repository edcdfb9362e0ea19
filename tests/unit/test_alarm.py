"""The alarms ring when something happens, and not for noise or for the lengthening of the first steps."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_powerflow.metrics.alarm import Thresholds, ringing

DEFAULTS = Thresholds(0.03, 1.3, 0.5, 10.0, 1e-3, 3)


def line(truncated=0.01, log_length=5.0, **other):
    return {
        "num_prompts": 16.0,
        "num_rollouts_kept": 64.0,
        "truncated_fraction": truncated,
        "truncated_fraction_error": 0.005,
        "response_log_length_mean": log_length,
        "response_log_length_error": 0.1,
    } | other


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        (line(), line(), set()),
        (line(), line(truncated=0.1), {"length"}),
        (line(), line(log_length=5.0 + np.log(1.15)), set()),
        (line(), line(log_length=5.0 + np.log(1.5)), {"length"}),
        (line(), line(log_length=4.0), {"short"}),
        (line(loss=1.5, residual_std=1.0), line(loss=100.0, residual_std=9.0), {"loss"}),
        (line(loss=1.5), line(loss=100.0), set()),
        (line(), line(sampler_gap_mean=0.01), {"sampler_gap"}),
        (line(), line(num_rollouts_kept=0.0), {"nothing_kept"}),
    ],
)
def test_each_alarm_rings_for_its_own_reason(before, after, names):
    assert ringing([before] * 20, DEFAULTS) == {}
    assert ringing([before] * 20 + [after] * 5, DEFAULTS).keys() == names


def test_lines_of_older_runs_ring_no_alarm_on_lengths():
    old = {"num_rollouts_kept": 4.0, "truncated_fraction": 0.0}
    assert ringing([old] * 30 + [old | {"truncated_fraction": 1.0}] * 30, DEFAULTS) == {}
    assert ringing([], DEFAULTS) == {}
