"""Every key of a resolved config that a loss depends on reaches the step's objective."""

from __future__ import annotations

import pytest

from megatron_powerflow.config_file import parse_config
from megatron_powerflow.objective.objective import (
    BalanceObjective,
    EntropyObjective,
    ImportanceRule,
    PolicyGradientObjective,
    SamplerRule,
)
from megatron_powerflow.objective.presets import PRESETS, Balance, EntropyMinimum, PolicyGradient
from megatron_powerflow.training.objective_of_step import objective_of_step
from tests.unit.test_config import MINIMAL


def resolved(step: int = 9, *overrides: str):
    return objective_of_step(parse_config(MINIMAL, [f"objective.{item}" for item in overrides]).objective, step)


def test_the_default_is_la_tb_at_alpha_4_with_the_groups_log_z():
    assert resolved() == BalanceObjective(PRESETS["la_tb"], 4.0, "group", ImportanceRule("none"), None)


def test_the_keys_of_a_balance():
    found = resolved(
        9, "alpha=2", "log_z=scalar", "tilt_cap=7", "ratio=seq_mean", "clip_epsilon=0.3", "clip=upper", "preset=flow_rl"
    )
    assert found == BalanceObjective(
        PRESETS["flow_rl"], 2.0, "scalar", ImportanceRule("seq_mean", 0.3, upper_only=True), 7
    )
    assert resolved(9, "ratio=seq").importance == ImportanceRule("seq", 0.2, upper_only=False)
    assert resolved(9, "sampler_ratio=seq").sampler == SamplerRule("seq", 2.0)
    assert resolved(9, "sampler_ratio=seq_mean", "sampler_ratio_cap=1.5").sampler == SamplerRule("seq_mean", 1.5)


def test_the_keys_of_a_rival():
    found = resolved(9, "preset=grpo", "kl_coefficient=0.1", "ratio=token", "clip_epsilon=0.3", "clip=upper")
    assert found == PolicyGradientObjective(PRESETS["grpo"], None, ImportanceRule("token", 0.3, True), 0.1)
    assert resolved(9, "preset=rl_token", "alpha=3").alpha == 3
    assert resolved(9, "preset=grpo", "sampler_ratio=token", "sampler_ratio_cap=3").sampler == SamplerRule("token", 3.0)
    assert resolved(9, "preset=one_shot_em", "kl_coefficient=0.1") == EntropyObjective(0.1)
    assert resolved(9, "preset=one_shot_em") == EntropyObjective(0.0)


def test_alpha_rises_from_1_and_is_there_at_the_last_step_of_its_warm_up():
    alphas = [resolved(step, "alpha=5", "alpha_warmup_steps=4").alpha for step in range(6)]
    assert alphas == [2, 3, 4, 5, 5, 5]
    assert [resolved(step, "alpha=5").alpha for step in range(2)] == [5, 5]
    assert [resolved(step, "alpha=0.5", "alpha_warmup_steps=2").alpha for step in range(3)] == [0.75, 0.5, 0.5]


@pytest.mark.parametrize(("log_z", "learned"), [("mlp", True), ("scalar", True), ("group", False), ("loo", False)])
def test_a_head_is_what_learns_log_z(log_z, learned):
    assert resolved(9, f"log_z={log_z}").learns_log_z == learned


LENGTH_TILTED = {"la_tb", "tb_token_score", "flow_rl", "rl_token"}


def test_every_preset_is_the_row_that_its_source_has():
    """Formulas at each row of presets.py; written once more here."""
    scaled = {"divide_by_std": True, "score_norm": "length"}
    assert {
        "la_tb": Balance("length", "length"),
        "tb_traj": Balance("none", "none"),
        "tb_token_target": Balance("none", "length"),
        "tb_token_score": Balance("length", "length", "length"),
        "tb_token_step": Balance("length", "length", "none", True),
        "flow_rl": Balance("length", "length"),
        "rl_traj": PolicyGradient("power", False, "none"),
        "rl_token": PolicyGradient("power_per_token", False, "none"),
        "grpo": PolicyGradient("gold", **scaled),
        "empo": PolicyGradient("cluster", **scaled),
        "ttrl": PolicyGradient("majority", **scaled),
        "intuitor": PolicyGradient("certainty", **scaled),
        "format_only": PolicyGradient("boxed", **scaled),
        "one_shot_em": EntropyMinimum(),
    } == PRESETS
    assert {name for name, form in PRESETS.items() if form.tilts} == LENGTH_TILTED
    assert {name for name, form in PRESETS.items() if form.per_length} == LENGTH_TILTED | {"tb_token_step"}
    assert {name for name, form in PRESETS.items() if isinstance(form, PolicyGradient) and form.powers} == {
        "rl_traj",
        "rl_token",
    }
