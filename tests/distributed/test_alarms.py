"""Each alarm, provoked once by a real run: what it says, what `run.stop_on_alarm` does, what a resumed run says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.alarm import ALARMS
from megatron_powerflow.metrics.writers import read_metrics
from tests.distributed.megatron_sessions import run_training

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    """Eight prompts a step, so that the tests on lengths need 18 steps (`length_shift.py`)."""
    model = tiny_model("llama", vocab_size=10, scale=0.05, rope=None, **SIZES)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [3 + i, 4]}) + "\n" for i in range(7)))
    values = {
        "model": {"hf_path": str(model)},
        "precision": {"dtype": "fp32"},
        "prompts": {"path": str(prompts)},
        "rollout": {
            "prompts_per_step": 8,
            "responses_per_prompt": 8,
            "max_prompt_tokens": 4,
            "max_response_tokens": 24,
            "max_concurrent_rows": 64,
        },
        "parallel": {"micro_batch_size": 64},
        "objective": {"log_z": "group"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"interval": 0},
        "evaluation": {"samples": 0},
        "metrics": {"wandb": "off", "curves": False},
        "run": {"output_dir": str(tmp_path / "run"), "export": True, "num_steps": 40},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    return path


def rung(folder: Path) -> set[str]:
    """The alarms that rang at any step."""
    return {name for name in ALARMS for line in read_metrics(folder) if line[f"alarm_{name}"]}


def state_of(folder: Path) -> str:
    return (folder / "checkpoints" / "latest").read_text().strip()
