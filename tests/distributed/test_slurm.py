"""`sbatch examples/run_70b.sh` on a real SLURM of two nodes: the script that users run, shrunk by its own arguments."""

from __future__ import annotations

import json
import platform
import shutil
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.distributed.slurm_cluster import SlurmCluster, why_not

pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def shrunk(model: Path, prompts: Path | None, run: Path, num_steps: int) -> list[str]:
    """prompts: None leaves the recipe's own."""
    return [
        f"model.hf_path={model}",
        "model.recompute=none",
        "parallel.tp=1",
        "parallel.pp=2",
        "parallel.sequence_parallel=false",
        "precision.dtype=fp32",
        *([f"prompts.path={prompts}", "prompts.require_answer=false"] if prompts else []),
        "rollout.prompts_per_step=2",
        "rollout.responses_per_prompt=2",
        "rollout.max_prompt_tokens=128",
        "rollout.max_response_tokens=12",
        f"run.num_steps={num_steps}",
        f"run.output_dir={run}",
        "evaluation.samples=1",
        "evaluation.num_prompts=2",
        "evaluation.num_responses=2",
        "metrics.wandb=offline",
    ]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in ("The capital of France is", "One plus one"))
    )
    return path


def submit(cluster: SlurmCluster, folder: Path, *settings: str) -> tuple[str, Path]:
    log = folder / "job.log"
    options = ["--nodes=2", "--gres=none", f"--output={log}", "--parsable"]
    job = cluster.run("sbatch", *options, "examples/run_70b.sh", *settings, cwd=REPOSITORY).strip()
    return job, log


def without_chat_template(model: Path, folder: Path) -> Path:
    """The model as a base model: no conversation was ever written for it."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("chat_template*"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_70b_script_trains_a_base_model_on_its_own_prompts_over_two_nodes(cluster, smollm2, tmp_path):
    from transformers import AutoModelForCausalLM

    run = tmp_path / "run"
    base = without_chat_template(smollm2, tmp_path / "base")
    job, log = submit(cluster, tmp_path, *shrunk(base, None, run, num_steps=2))
    state = cluster.wait_for(job, timeout=400)
    assert state == "COMPLETED", log.read_text()
    text = log.read_text()
    assert "2 processes = tp 1 x cp 1 x pp 2 x dp 1" in text
    assert "the model has no chat template" in text
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert AutoModelForCausalLM.from_pretrained(run / "hf_export").config.num_hidden_layers == 30
    assert list((run / "wandb").glob("offline-run-*"))
    launch = json.loads((run / "launches.jsonl").read_text())
    assert launch["versions"]["python"] == platform.python_version()  # the interpreter of this environment


def test_a_warned_job_saves_requeues_and_continues(cluster, tiny_model, prompts, tmp_path):
    """SIGUSR1 to the batch script, as SLURM sends it before the limit: saved, requeued, continued to the end."""
    run = tmp_path / "run"
    words = tmp_path / "words.jsonl"
    words.write_text('{"prompt": "w5 w6 w7"}\n{"prompt": "w8 w9"}\n')
    job, log = submit(cluster, tmp_path, *shrunk(tiny_model("llama"), words, run, num_steps=60))
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    while "back into the queue" not in log.read_text():
        assert time.monotonic() < deadline + 100, log.read_text()
        time.sleep(0.5)
    while "JobState=PENDING" not in cluster.run("scontrol", "show", "job", job):  # ends, and is put back
        assert time.monotonic() < deadline + 150, log.read_text()
        time.sleep(0.5)
    # its first start is still being cleared away: a second one in that moment is lost (the credential is revoked)
    while set(cluster.run("sinfo", "--noheader", "--Node", "--format=%t").split()) != {"idle"}:
        assert time.monotonic() < deadline + 200, cluster.run("sinfo")
        time.sleep(0.5)
    # a requeued job waits two minutes by default; it may start now
    written = log.read_text()
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    state = cluster.wait_for(job, timeout=400)
    if state == "FAILED" and log.read_text() == written:
        # SLURM lost the second start all the same, before a word of ours: an operator puts the job back
        cluster.run("scontrol", "requeue", job)
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        state = cluster.wait_for(job, timeout=400)
    assert state == "COMPLETED", log.read_text()
    assert "continuing after step" in log.read_text()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(60))


def test_srun_alone_needs_no_torchrun(cluster, tiny_model, prompts, tmp_path):
    """`srun powerflow train`: the processes find each other by what SLURM says of the step."""
    import sys

    run = tmp_path / "run"
    words = tmp_path / "words.jsonl"
    words.write_text('{"prompt": "w5 w6 w7"}\n{"prompt": "w8 w9"}\n')
    command = [sys.executable, "-m", "megatron_powerflow.cli", "train", "megatron_powerflow/recipes/llama31_70b.yaml"]
    settings = shrunk(tiny_model("llama"), words, run, num_steps=2)
    cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *command, *settings, cwd=REPOSITORY, timeout=300)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_an_impossible_run_is_refused_before_any_process_starts(cluster, tiny_model, prompts, tmp_path):
    settings = shrunk(tiny_model("llama"), prompts, tmp_path / "run", num_steps=2)
    job, log = submit(cluster, tmp_path, *settings, "parallel.pp=5")
    assert cluster.wait_for(job, timeout=100) == "FAILED"
    assert "parallel.pp=5 needs 5 layers or more, and num_layers=4" in log.read_text()
    assert "ExitCode=2:0" in cluster.run("scontrol", "show", "job", job)
