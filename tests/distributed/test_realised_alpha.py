"""What `powerflow train` says of its own alpha: the one it was asked for, under another layout too; and runs end at it.

The same runs in one process are those of test_exact_optimum.py, where the policy is compared with the target.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_powerflow.metrics.writers import read_metrics
from tests.distributed.megatron_sessions import run_training
from tests.enumerable import MAX_TOKENS, log_probs_of, make_enumerable, realised_alpha_of


@pytest.fixture(scope="module")
def enumerable(tmp_path_factory) -> tuple[Path, Path]:
    """(model folder, config file)."""
    folder = tmp_path_factory.mktemp("enumerable")
    model, prompts = make_enumerable(folder, scale=0.05, seed=6)
    values = {
        "model": {"hf_path": str(model)},
        "prompts": {"path": str(prompts)},
        "precision": {"dtype": "fp32"},
        "rollout": {
            "prompts_per_step": 1,
            "responses_per_prompt": 512,
            "max_prompt_tokens": 8,
            "max_response_tokens": MAX_TOKENS,
            "max_concurrent_rows": 512,
        },
        "parallel": {"micro_batch_size": 512},
        "objective": {"alpha": 2.0},
        "optimizer": {"lr": 5e-3, "lr_decay": "cosine"},
        "checkpoint": {"interval": 0},
        "evaluation": {"samples": 0},
        "metrics": {"wandb": "off", "curves": False},
        "run": {"output_dir": str(folder / "run")},
    }
    (folder / "config.yaml").write_text(json.dumps(values))
    return model, folder / "config.yaml"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "settings", "num_steps"),
    [
        ("la_tb", ["objective.log_z=group"], 60),
        ("rl_token", [], 60),
        ("tb_traj", ["objective.log_z=group"], 250),  # short responses: the others are rarely seen
    ],
)
def test_training_over_two_ranks_comes_to_the_alpha_it_aims_at(
    gloo, enumerable, tmp_path, record_property, preset, settings, num_steps
):
    model, config = enumerable
    changes = [f"objective.preset={preset}", f"run.num_steps={num_steps}", f"run.output_dir={tmp_path}", *settings]
    gloo.run(2, run_training, config, *changes, "parallel.tp=2")
    found = realised_alpha_of(log_probs_of(tmp_path / "hf_export"), log_probs_of(model))
    record_property("alpha_realised", found["alpha_realised"])
    assert found["alpha_realised"] == pytest.approx(2.0, abs=0.02)
    assert found["alpha_realised_r2"] > 0.98
    lines = read_metrics(tmp_path)
    assert lines[0]["alpha_realised"] == pytest.approx(1.0, abs=1e-6)  # the untrained policy is the base model
    assert lines[0]["lambda_realised"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["alpha_realised"] == pytest.approx(2.0, abs=0.15)  # of 512 responses, most of them alike


def test_a_run_ends_where_it_has_come_to_its_alpha(gloo, enumerable, tmp_path):
    """It saves and exports, says why, does nothing when started again, and goes on when it is asked for more."""
    settings = ["objective.log_z=group", "run.num_steps=60", f"run.output_dir={tmp_path}", "checkpoint.interval=100"]
    (printed,) = gloo.run(1, run_training, enumerable[1], *settings, "run.stop_at_alpha=1.5")
    ended = read_metrics(tmp_path)
    values = [line["alpha_realised"] for line in ended]
    assert 10 <= len(values) < 30
    assert sorted(values[-10:])[4] + sorted(values[-10:])[5] >= 3.0
    said = re.search(r"realised alpha [\d.]+, the median of 10 steps, has reached run.stop_at_alpha=1.5.*", printed)
    assert said is not None
    assert f"ends after step {len(values)}" in said.group()
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == f"step_{len(values):06d}"
    assert (tmp_path / "hf_export" / "config.json").is_file()

    (printed, _) = gloo.run(2, run_training, enumerable[1], *settings, "run.stop_at_alpha=1.5", "parallel.tp=2")
    assert said.group() in printed
    assert read_metrics(tmp_path) == ended

    (printed,) = gloo.run(1, run_training, enumerable[1], *settings, f"run.num_steps={len(values) + 2}")
    assert "stop_at_alpha" not in printed
    assert read_metrics(tmp_path)[: len(values)] == ended
    assert len(read_metrics(tmp_path)) == len(values) + 2
