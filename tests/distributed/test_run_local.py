"""The documented command, as documented: examples/run_local.sh, two small steps of it."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_run_local_trains_exports_and_shows(smollm2, tmp_path):
    run = tmp_path / "run"
    smaller = {"rollout.prompts_per_step": 2, "rollout.max_response_tokens": 16, "evaluation.num_prompts": 2}
    shorter = ["run.num_steps=2", *(f"{key}={value}" for key, value in smaller.items())]
    command = ["bash", "examples/run_local.sh", *shorter, f"run.output_dir={run}"]
    first = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800)
    assert first.returncode == 0, first.stderr[-3000:]
    for words in ("step 2/2", "before", "after", "the export in transformers", str(run / "hf_export"), "wandb"):
        assert words in first.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["residual_mean"] == pytest.approx(0.0, abs=1e-5)  # the calibrated start, on the real model
    assert max(line["sampler_gap_max"] for line in lines) < 1e-3
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 0, 2, 2, 2]
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "installing" not in again.stdout
    assert "continues step_000002" in again.stdout
