"""The alarms ring when something happens, and not for noise or for the lengthening of the first steps."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from megatron_powerflow.config import AlarmName
from megatron_powerflow.metrics.alarm import ALARMS, Thresholds, has_diverged, raised_alarms
from megatron_powerflow.metrics.prompt_statistics import length_statistics

SEEDS = range(3)
DEFAULTS = Thresholds(0.03, 1.3, 0.5, 10.0, 1e-3, 3)


def test_the_config_knows_every_alarm():
    assert get_args(AlarmName) == ALARMS


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
    assert raised_alarms([before] * 20, DEFAULTS) == {}
    assert raised_alarms([before] * 20 + [after] * 5, DEFAULTS).keys() == names


def test_lines_of_older_runs_ring_no_alarm_on_lengths():
    old = {"num_rollouts_kept": 4.0, "truncated_fraction": 0.0}
    assert raised_alarms([old] * 30 + [old | {"truncated_fraction": 1.0}] * 30, DEFAULTS) == {}
    assert raised_alarms([], DEFAULTS) == {}


def simulated(seed: int, steps: int, *, num_prompts=16, drift=0.0, begins=0) -> list[dict[str, float]]:
    """Lines of a run whose prompts differ by .6 in log length, their 8 responses by .4; 3 % of all are cut.

    drift: in log length a step, after the step `begins`.
    """
    generator = np.random.default_rng(seed)
    lines = []
    for step in range(steps):
        logs = generator.normal(size=(num_prompts, 1)) * 0.6 + generator.normal(size=(num_prompts, 8)) * 0.4
        logs = logs.ravel() + drift * max(0, step - begins)
        every = {
            "rollout_index": np.arange(logs.size),
            "truncated": (logs > 1.36).astype(float),
            "num_response_tokens": np.round(200 * np.exp(np.minimum(logs, 1.36))),
        }
        told = length_statistics(every, 8) | {"truncated_fraction": every["truncated"].mean()}
        lines.append({name: value for name, value in told.items() if np.isfinite(value)} | {"num_rollouts_kept": 1.0})
    return lines


def ring_at(lines: list[dict[str, float]]) -> tuple[int, str] | None:
    """The first step, counted from 0, and the name of the alarm."""
    return next(((i, name) for i in range(len(lines)) for name in raised_alarms(lines[: i + 1], DEFAULTS)), None)


@pytest.mark.parametrize("seed", SEEDS)
def test_500_steps_of_noise_ring_nothing(seed):
    assert ring_at(simulated(seed, 500)) is None


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("drift", "name"), [(0.05, "length"), (-0.05, "short")])
def test_a_gradual_collapse_rings(seed, drift, name):
    """.05 a step: half, or a fifth cut, after some 14 steps; the window's middle lies two behind."""
    step, found = ring_at(simulated(seed, 100, drift=drift, begins=40))
    assert found == name
    assert 40 < step <= 70


@pytest.mark.parametrize(("after", "name"), [(3.0, "short"), (7.0, "length")])
def test_a_collapse_within_the_first_steps_rings(after, name):
    """The first steps are spoilt, too: only the first one tells what the base model's lengths were."""
    assert ring_at([line()] + [line(log_length=after)] * 20) == (5, name)
    assert ring_at([line()] + [line(truncated=0.9)] * 20) == (5, "length")


def test_lengths_may_settle_in_the_first_steps():
    assert ring_at([line(truncated=0.05 + 0.02 * step, log_length=5 + step / 10) for step in range(8)] * 5) is None


def test_one_prompt_a_step_has_no_test_on_lengths():
    lines = simulated(0, 60, num_prompts=1, drift=0.1, begins=20)
    assert ring_at(lines) is None
    assert "truncated_fraction_error" not in lines[-1]


def losses(values) -> list[dict[str, float]]:
    return [{"num_rollouts_kept": 4.0, "residual_std": 1.0, "loss": float(value), "alpha": 4.0} for value in values]


def test_a_noisy_loss_rings_in_less_than_one_run_of_a_hundred():
    """A standard deviation of .8 in its logarithm, as at a high rate: of ten steps the least is a fifth of the rest."""
    runs = np.exp(0.8 * np.random.default_rng(0).normal(size=(300, 60)))
    rang = [any("loss" in raised_alarms(losses(run[:length]), DEFAULTS) for length in range(1, 61)) for run in runs]
    assert np.mean(rang) < 0.01


def test_a_loss_that_the_first_update_spoils_rings():
    assert "loss" in raised_alarms(losses([1.0, *[50.0] * 9]), DEFAULTS)
    assert "loss" not in raised_alarms(losses([1.0, *[5.0] * 9]), DEFAULTS)


def test_a_loss_is_compared_at_its_own_alpha():
    """Where alpha rises from 1 the loss begins at nothing."""
    rising = [line | {"alpha": 1.0 + step / 10} for step, line in enumerate(losses(np.linspace(0.001, 1.0, 30)))]
    assert "loss" not in raised_alarms([*rising, *losses([1.0] * 30)], DEFAULTS)


def test_ten_times_nearly_nothing_is_nothing():
    assert "loss" not in raised_alarms(losses([1e-5] * 20 + [5e-3] * 5), DEFAULTS)
    assert "loss" in raised_alarms(losses([1e-5] * 20 + [2e-2] * 5), DEFAULTS)


def test_one_loss_of_five_rings_nothing():
    assert "loss" not in raised_alarms(losses([1.0] * 20 + [1.0, 900.0, 1.0, 900.0, 1.0]), DEFAULTS)
    assert "loss" in raised_alarms(losses([1.0] * 20 + [1.0, 900.0, 900.0, 900.0, 1.0]), DEFAULTS)


def test_the_recent_losses_are_not_among_the_first():
    """Six steps: the first alone is before the last five."""
    assert "loss" in raised_alarms(losses([1.0, 20.0, 20.0, 20.0, 20.0, 20.0]), DEFAULTS)
    assert "loss" not in raised_alarms(losses([1.0, 20.0, 20.0, 20.0, 20.0]), DEFAULTS)


def test_the_sampler_gap_rings_above_its_bound():
    assert "sampler_gap" not in raised_alarms([line(sampler_gap_mean=1e-3)], DEFAULTS)
    assert "sampler_gap" in raised_alarms([line(sampler_gap_mean=1.1e-3)], DEFAULTS)


def test_nothing_kept_rings_after_three_steps_in_a_row():
    nothing = line(num_rollouts_kept=0.0)
    assert "nothing_kept" not in raised_alarms([nothing, line(), nothing, nothing], DEFAULTS)
    assert "nothing_kept" in raised_alarms([line(), nothing, nothing, nothing], DEFAULTS)
    assert "nothing_kept" not in raised_alarms([nothing, nothing], DEFAULTS)


def test_a_high_truncated_share_that_does_not_rise_rings_nothing():
    """A rise of .02 is significant here, and allowed."""
    quiet = {"truncated_fraction_error": 0.0005}
    before, after = line(truncated=0.5, **quiet), line(truncated=0.52, **quiet)
    assert raised_alarms([before] * 20 + [after] * 5, DEFAULTS) == {}
    assert "length" in raised_alarms([before] * 20 + [line(truncated=0.54, **quiet)] * 5, DEFAULTS)


@pytest.mark.parametrize(("factor", "rings"), [(1.25, False), (1.35, True), (0.55, False), (0.45, True)])
def test_lengths_ring_at_the_factors_of_the_config(factor, rings):
    quiet = {"response_log_length_error": 0.001}
    after = line(log_length=5.0 + np.log(factor), **quiet)
    assert bool(raised_alarms([line(**quiet)] * 20 + [after] * 5, DEFAULTS)) == rings


def test_a_run_has_diverged_where_its_loss_grew_or_half_of_it_came_to_be_cut():
    assert not has_diverged([line()] * 25, DEFAULTS)
    assert has_diverged([line(truncated=0.1)] + [line(truncated=0.9)] * 20, DEFAULTS)
    assert not has_diverged([line(truncated=0.9)] + [line(truncated=0.1)] * 20, DEFAULTS)
    assert has_diverged([*losses([1.0] * 20), *losses([100.0] * 5)], DEFAULTS)
