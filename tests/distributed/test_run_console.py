"""What a person sees of a run: what to do when it is done, and one line when it is interrupted."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run_cli


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [5 + i, 6, 7]}) + "\n" for i in range(7)))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}}}
precision: {{dtype: fp32}}
prompts: {{path: {prompts}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
checkpoint: {{interval: 2}}
metrics: {{wandb: "off"}}
evaluation: {{samples: 0}}
run: {{num_steps: 1, output_dir: unused}}
"""
    )
    return path


@pytest.mark.slow
def test_a_finished_run_says_what_to_do_next_whatever_its_folder_is_called(config, tmp_path):
    """Every command can be typed as it stands. With a broken matplotlib the run is done all the same."""
    run = tmp_path / "a [bold]run[/bold] of :smile:" / ("long_name_" * 12)
    (tmp_path / "broken" / "matplotlib").mkdir(parents=True)
    (tmp_path / "broken" / "matplotlib" / "__init__.py").write_text("raise RuntimeError('half an installation')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path / 'broken'}:{REPOSITORY}"}
    done = run_cli("train", config, f"run.output_dir={run}", "objective.log_z=mlp", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    mask = os.umask(0)
    os.umask(mask)
    written = {path: path.stat().st_mode & 0o777 for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in written} >= {"model.safetensors", "log_z_head.safetensors", "README.md"}
    assert [path for path, mode in written.items() if mode != 0o666 & ~mask] == []  # others may read what is served
    lines = done.stdout.splitlines()
    assert "no curves.png: half an installation; `powerflow curves` draws it from the run's folder" in lines
    first = next(place for place, line in enumerate(lines) if line.startswith("done: "))
    assert lines[first] == f"done: {run}, latest checkpoint {run / 'checkpoints' / 'step_000001'}"
    commands = [shlex.split(line.strip().split("   ", 1)[1]) for line in lines[first + 1 :]]
    assert [command[:2] for command in commands] == [
        ["vllm", "serve"],
        ["powerflow", "evaluate"],
        ["powerflow", "report"],
    ]
    assert commands[0][2] == str(run / "hf_export")
    assert commands[1][-1] == str(run / "evaluation")
    report = run_cli(*commands[2][1:])
    assert report.returncode == 0, report.stderr
    assert (run / "report" / "index.html").is_file()


@pytest.mark.slow
def test_ctrl_c_is_one_line_with_the_last_checkpoint(config, tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "megatron_powerflow.cli",
            "train",
            config,
            f"run.output_dir={run}",
            "run.num_steps=100000",
            "checkpoint.keep=1",
        ],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a job of `&` ignores it
    )
    try:
        deadline = time.monotonic() + 300
        while not (run / "checkpoints" / "latest").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 130, errors
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    assert errors.splitlines() == [f"interrupted; the same command continues from {latest}"]
