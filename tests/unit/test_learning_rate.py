"""The learning rate is a function of the step."""

from __future__ import annotations

import pytest

from megatron_powerflow.config import OptimizerSection
from megatron_powerflow.training.learning_rate import decay, learning_rates


def section(**changes) -> OptimizerSection:
    return OptimizerSection(**changes)


def test_constant_without_warm_up():
    assert [decay(section(), step, 10) for step in (0, 5, 9)] == [1, 1, 1]


def test_warm_up_reaches_the_peak_at_its_last_step():
    assert [decay(section(warmup_steps=4), step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(("kind", "half_way"), [("linear", 0.5), ("cosine", 0.5)])
def test_decay_runs_from_the_end_of_the_warm_up_to_the_last_step(kind, half_way):
    values = [decay(section(warmup_steps=2, lr_decay=kind), step, 12) for step in range(13)]
    assert values[2] == 1.0
    assert values[7] == pytest.approx(half_way)
    assert values[12] == pytest.approx(0.0)
    assert values[2:] == sorted(values[2:], reverse=True)


def test_the_floor_holds_for_the_policy_after_its_warm_up():
    section_ = section(lr=1e-3, log_z_lr=0.4, min_lr=5e-4, warmup_steps=4, lr_decay="linear")
    assert learning_rates(section_, 0, 12) == (2.5e-4, 0.1)
    assert learning_rates(section_, 11, 12) == (5e-4, pytest.approx(0.05))


def test_the_cosine_is_half_a_wave():
    values = [decay(section(lr_decay="cosine"), step, 12) for step in (0, 3, 4, 6, 8, 12)]
    assert values == pytest.approx([1, (1 + 0.5**0.5) / 2, 0.75, 0.5, 0.25, 0])


def test_the_heads_rate_warms_up_and_decays_with_the_policys():
    section_ = section(lr=1.0, log_z_lr=0.4, warmup_steps=2, lr_decay="linear")
    assert [learning_rates(section_, step, 6)[1] for step in (0, 1, 2, 4)] == pytest.approx([0.2, 0.4, 0.4, 0.2])


def test_nobody_learns_log_z_with_a_group_estimate():
    assert learning_rates(section(lr=1.0), 0, 12) == (1.0, None)
