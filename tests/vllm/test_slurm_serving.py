"""`sbatch examples/run_70b_vllm.sh` on a real SLURM of two nodes, one of which serves: warned in mid-step, put back
into the queue, continued; no prompt is answered twice."""

from __future__ import annotations

import json
import time

import pytest

from tests.conftest import REPOSITORY, run_cli
from tests.distributed.slurm_cluster import SlurmCluster, why_not
from tests.vllm.servers import ARGUMENTS, CPU_SERVER

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]
STEPS = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), kill_wait=30) as started:
        started.environment |= CPU_SERVER
        yield started


def until(what, log, seconds: float, *, running=lambda: True) -> None:
    """Wait for something; what the job has printed is shown where it does not come, or the job ends before."""
    deadline = time.monotonic() + seconds
    while not what():
        is_waited_for = time.monotonic() < deadline and running()
        assert is_waited_for, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)


def test_a_split_job_is_warned_in_mid_step_and_continues(cluster, job, tmp_path):
    run, log = job.run, tmp_path / "job.log"
    settings = {
        "model.hf_path": job.model,
        "parallel.tp": 1,
        "parallel.pp": 1,
        "parallel.sequence_parallel": "false",
        "precision.dtype": "fp32",
        "prompts.path": job.prompts,
        "prompts.require_answer": "false",
        "prompts.suffix": "null",
        "rollout.prompts_per_step": 6,
        "rollout.responses_per_prompt": 4,
        "rollout.max_prompt_tokens": 16,
        "rollout.max_response_tokens": 120,
        "rollout.vllm.tp": 1,
        "rollout.vllm.python": job.python,
        "rollout.vllm.arguments": f"[{','.join(ARGUMENTS)}]",
        "rollout.vllm.port": job.port,
        "rollout.vllm.max_requests": 1,
        "run.num_steps": STEPS,
        "run.output_dir": run,
        "evaluation.samples": 0,
        "evaluation.prompts": "null",
        "evaluation.num_responses": "null",
        "metrics.wandb": "off",
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    options = ["--nodes=2", "--gres=none", f"--output={log}", "--parsable"]
    script = ["examples/run_70b_vllm.sh", "--servers", "1", "--preflight", "off"]
    number = cluster.run("sbatch", *options, *script, *words, cwd=REPOSITORY).strip()
    metrics, in_hand = run / "metrics.jsonl", run / "in_hand"

    def in_mid_step() -> bool:
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        return done >= 2 and any(path.stat().st_size for path in in_hand.glob(f"step_{done + 1:06d}.*"))

    def running() -> bool:
        shown = cluster.run("scontrol", "show", "job", number)
        return any(f"JobState={state}" in shown for state in ("PENDING", "CONFIGURING", "RUNNING"))

    until(in_mid_step, log, 400, running=running)
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    until(lambda: "back into the queue" in log.read_text(), log, 200)
    until(lambda: "JobState=PENDING" in cluster.run("scontrol", "show", "job", number), log, 120)
    cluster.wait_until_idle(120)
    cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")
    assert cluster.wait_for(number, timeout=500) == "COMPLETED", log.read_text()
    text = log.read_text()
    assert "continuing after step" in text
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(STEPS))
    lags = [json.loads(line)["lag_mean"] for line in metrics.read_text().splitlines()]
    assert max(lags) == 1.0, lags
    found = run_cli("inspect", run)
    assert found.returncode == 0, found.stderr
    assert f"{6 * STEPS} prompts of {STEPS} steps, each answered once" in found.stdout
