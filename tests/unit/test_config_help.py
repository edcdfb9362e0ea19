"""`powerflow config`: every key with its type, default, meaning, and the objectives that know it."""

from __future__ import annotations

import pytest

from megatron_powerflow.config_help import explain, keys
from megatron_powerflow.errors import UserError
from tests.conftest import run_cli


def test_every_key_says_what_it_means():
    found = list(keys())
    assert len({key.name for key in found}) == len(found) > 80
    for key in found:
        assert key.meaning, key.name
        assert key.type, key.name
        assert "<" not in key.type, key.name  # the name of a Python class is no word of YAML


@pytest.mark.slow
def test_a_key_names_the_objectives_that_know_it():
    (cap,) = explain("objective.tilt_cap")
    assert "la_tb" in cap.presets
    assert "grpo" not in cap.presets
    (lr,) = explain("optimizer.lr")
    assert lr.presets == ()
    (alpha,) = explain("objective.alpha")
    assert "la_tb" in alpha.presets
    assert "grpo" not in alpha.presets
    (scale,) = explain("objective.reward_scale")  # has an effect only beside a task_reward
    assert {"la_tb", "flow_rl"} <= set(scale.presets)
    assert "grpo" not in scale.presets


@pytest.mark.slow
def test_a_section_is_all_of_its_keys():
    assert {key.name.split(".")[0] for key in explain("rollout")} == {"rollout"}
    assert len(explain("rollout")) > 5


@pytest.mark.slow
def test_a_misspelt_key_is_met_with_the_likely_ones():
    with pytest.raises(UserError, match=r"did you mean objective\.alpha"):
        explain("objective.alhpa")
    with pytest.raises(UserError, match=r"rollout\.temperature"):
        explain("temperature")


@pytest.mark.slow
def test_the_commands_of_the_first_hour():
    assert run_cli("--version").stdout.startswith("powerflow ")
    explained = run_cli("config", "objective.alpha")
    assert explained.returncode == 0
    assert explained.stdout.startswith("objective.alpha  (number")
    assert run_cli("config", "nothing.of.this").returncode == 2
    listed = run_cli("recipes")
    assert "llama31_70b " in listed.stdout
    env = run_cli("env")
    assert env.returncode == 0
    for words in ("megatron_powerflow ", "python 3", "torch ", "CPU cores"):
        assert words in env.stdout
