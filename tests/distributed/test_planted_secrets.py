"""Keys in the environment, and keys that somebody types: in no file of a real run's folder, in nothing it prints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import run_cli

SECRETS = {
    "WANDB_API_KEY": "ab12" * 10,
    "HF_TOKEN": "hf_plantedplantedplantedplanted",
    "OPENAI_API_KEY": "sk-planted-0123456789",
    "DATABASE_PASSWORD": "hunter2-hunter2",
}


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n{"prompt_token_ids": [7, 8]}\n')
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}}}
precision: {{dtype: fp32}}
prompts: {{path: {tmp_path / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 4, max_response_tokens: 4, save: true}}
metrics: {{wandb: offline}}
evaluation: {{samples: 1}}
run: {{num_steps: 1, output_dir: {tmp_path / "run"}}}
"""
    )
    return path


def found_in(folder: Path) -> list[str]:
    """Each file that holds a secret, as text or within wandb's own files."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 15
    assert any("wandb" in path.parts and path.suffix == ".wandb" for path in files)
    return [
        f"{name} in {path.relative_to(folder)}"
        for path in files
        for name, secret in SECRETS.items()
        if secret.encode() in path.read_bytes()
    ]


@pytest.mark.slow
def test_no_secret_is_in_a_runs_folder_its_report_or_its_output(config, tmp_path):
    run, environment = tmp_path / "run", {**os.environ, **SECRETS}
    done = run_cli("train", config, env=environment)
    assert done.returncode == 0, done.stderr
    again = run_cli("report", run, "--out", tmp_path / "run" / "report", env=environment)
    assert again.returncode == 0, again.stderr
    assert found_in(run) == []
    for text in (done.stdout, done.stderr, again.stdout, again.stderr):
        assert not [name for name, secret in SECRETS.items() if secret in text]
    launch = json.loads((run / "launches.jsonl").read_text())
    assert launch["command"] == f"python -m megatron_powerflow.cli train {config}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.name=hunter2-hunter2", "run.name: holds a password"),
        ("metrics.wandb_project=https://me:hunter2-hunter2@host/x", "metrics.wandb_project: holds a password"),
        ("metrics.api_key=hunter2-hunter2", "unknown key"),
        ("run.name=${oc.env:DATABASE_PASSWORD}", "calls a resolver"),
        ("run.name=${${metrics.wandb_project}:DATABASE_PASSWORD}", "calls a resolver"),
    ],
)
def test_a_secret_that_is_typed_is_refused_and_not_repeated(config, tmp_path, override, words):
    done = run_cli("train", config, "metrics.wandb_project=oc.env", override, env={**os.environ, **SECRETS})
    assert done.returncode == 2
    assert words in done.stderr
    assert "hunter2" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
