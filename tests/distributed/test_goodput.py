"""Goodput of a real run that is killed twice: its seconds are those of a clock outside, its lost steps those counted
apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run_cli


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}}}
precision: {{dtype: fp32}}
prompts: {{path: {tmp_path / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
optimizer: {{lr: 1e-3}}
checkpoint: {{interval: 4}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 40, output_dir: {tmp_path / "run"}, export: false}}
"""
    )
    return path


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_after(config: Path, metrics: Path, lines: int) -> tuple[float, float]:
    """Start the run and kill it when metrics.jsonl has so many lines. Returns when it began and ended, by our clock."""
    began = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_powerflow.cli", "train", str(config)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while num_lines(metrics) < lines:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return began, time.time()


def latest_step(run: Path) -> int:
    pointer = run / "checkpoints" / "latest"
    return int(pointer.read_text().strip().removeprefix("step_")) if pointer.exists() else 0


@pytest.mark.long  # the kill storm of CI compares goodput with its own clock, too
def test_the_goodput_of_a_run_that_was_killed_twice_is_what_a_clock_outside_says(config, tmp_path):
    run, lost, waited, ended = tmp_path / "run", 0, 0.0, 0.0
    first = time.time()
    for lines in (2, 10):  # the first one before there is a checkpoint
        began, killed = kill_after(config, run / "metrics.jsonl", lines)
        waited += began - ended if ended else 0.0
        ended = killed
        lost += num_lines(run / "metrics.jsonl") - latest_step(run)
        time.sleep(3)
    waited += time.time() - ended
    done = run_cli("train", config)
    assert done.returncode == 0, done.stderr
    # Python takes two seconds to end a process that has nothing left to do: who runs it waits, and no GPU is needed
    wall = (run / "events.jsonl").stat().st_mtime - first
    said = run_cli("goodput", run, "--json")
    assert said.returncode == 0, said.stderr
    (goodput,) = json.loads(said.stdout).values()
    assert goodput["wall_seconds"] == pytest.approx(wall, abs=max(1.0, 0.01 * wall))
    assert sum(goodput["seconds"].values()) == pytest.approx(goodput["wall_seconds"], abs=1e-6)
    assert goodput["seconds"]["waiting"] == pytest.approx(waited, abs=3.0)  # the file is touched every 2 s
    assert goodput["num_steps_lost"] == lost
    assert (goodput["num_steps_done"], goodput["num_starts"]) == (40, 3)
    assert goodput["interruptions"] == {"killed": 2}
    assert goodput["seconds"]["other"] < 0.1 * wall
    table = run_cli("goodput", run)
    assert table.returncode == 0, table.stderr
    assert f"{lost} steps lost; interrupted by: killed 2" in table.stdout
