"""The worked example of the documentation: examples/own_objective.py, its laws and a run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.own_objective import NAME, ROW
from megatron_powerflow.objective.policy_gradient import group_advantage, power_reward
from megatron_powerflow.objective.presets import PRESETS
from tests.conftest import REPOSITORY

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
KEPT = torch.ones(6, dtype=torch.bool)


def advantage(reward: torch.Tensor) -> torch.Tensor:
    return group_advantage(reward, GROUP, KEPT, divide_by_std=ROW.divide_by_std)


def test_importing_the_example_changes_no_table():
    assert NAME not in PRESETS


def test_each_group_has_an_advantage_of_mean_0_and_spread_1():
    found = advantage(torch.tensor([1.0, 2.0, 6.0, -3.0, 40.0, 7.0], dtype=torch.float64))
    for members in (found[:3], found[3:]):
        assert float(members.mean()) == pytest.approx(0.0, abs=1e-12)
        assert float(members.std()) == pytest.approx(1.0, abs=1e-5)


def test_the_power_distribution_is_its_optimum():
    """There alpha S_ref - S is log Z for every response of a prompt, so nothing is to be gained."""
    alpha, length, psi = 4.0, torch.full((6,), 5.0, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    reference = torch.tensor([-3.0, -5.0, -9.0, -2.0, -4.0, -4.5], dtype=torch.float64)
    log_z = torch.tensor([1.5, 1.5, 1.5, -2.0, -2.0, -2.0], dtype=torch.float64)
    reward = power_reward(alpha * reference - log_z, reference, length, psi, alpha, "none")
    assert float(advantage(reward).abs().max()) < 1e-6


@pytest.mark.slow
def test_it_trains(tiny_model, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}}}
precision: {{dtype: fp32}}
prompts: {{path: {prompts}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 4, max_prompt_tokens: 8, max_response_tokens: 6}}
objective: {{preset: {NAME}}}
optimizer: {{lr: 1e-3}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 2, output_dir: {tmp_path / "run"}}}
"""
    )
    command = [sys.executable, "examples/own_objective.py", "train", str(config)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["alpha"] == 4.0
    assert lines[0]["advantage_std"] == pytest.approx((3 / 4) ** 0.5, abs=1e-3)  # of 4 numbers with a spread of 1
