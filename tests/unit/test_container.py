"""The Dockerfile pins what is tested and what its base image brings; run_70b.sh and run_7b.sh run all in the image."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

LINES = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
# Stands for srun with pyxis, which is not here: notes its options, and runs what is no training. Training outlasts the
# start of the servers in the background.
SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$*" >> "$SRUN_LOG"
case "$*" in *torch.distributed.run*rollout.vllm.start=*)
  for _ in {1..600}; do grep -q "cli serve" "$SRUN_LOG" && break; sleep 0.1; done ;;
esac
case "$*" in *torch.distributed.run*|*"cli preflight"*|*"cli train"*|*"cli serve"*) exit 0 ;; esac
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case "$2" in hostnames) echo n1 ;; node) echo 'NodeName=n1 NodeAddr=10.0.0.1' ;; esac
"""


def instructions(kind: str) -> list[str]:
    return [line.removeprefix(kind).strip() for line in LINES if line.startswith(f"{kind} ")]


def test_what_is_copied_is_there_and_the_user_is_not_root():
    for copied in instructions("COPY"):
        for source in copied.split()[:-1]:
            assert (REPOSITORY / source).exists(), source
    assert instructions("USER")[-1] not in ("root", "0")
    assert LINES[-1].startswith("USER ")


def test_megatron_core_is_the_one_that_is_tested():
    (version,) = re.findall(r'"megatron-core==([\d.]+)"', "\n".join(LINES))
    assert f'megatron-core=={version}; python_version >= "3.12"' in (REPOSITORY / "constraints.txt").read_text()


def test_pip_is_constrained_by_the_pins_alone():
    """NVIDIA's images name a file of their own in PIP_CONSTRAINT, which pip adds to those of -c."""
    (install,) = [line for line in instructions("RUN") if " pip install " in line]
    assert install.startswith("env -u PIP_CONSTRAINT python3 -m pip install ")
    assert " -c /tmp/pins.txt " in install


def test_the_pins_are_what_is_found_and_the_rest_of_what_is_tested(tmp_path):
    """The Dockerfile's own lines, in this environment instead of NVIDIA's."""
    (make,) = [line for line in instructions("RUN") if "> /tmp/pins.txt" in line]
    pins = tmp_path / "pins.txt"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = make.replace("/tmp/pins.txt", str(pins))
    subprocess.run(["bash", "-euc", command], cwd=REPOSITORY, env={**os.environ, "PATH": path}, check=True)
    pinned = dict(line.split("==", 1) for line in pins.read_text().splitlines())
    assert len(pinned) == len(pins.read_text().splitlines())  # nothing twice
    assert pinned["torch"] == metadata.version("torch")
    assert pinned["numpy"] == metadata.version("numpy")
    assert "megatron-core" not in pinned  # it has a version of its own in the next line
    tested = re.findall(r"^([\w.-]+)==", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert set(pinned) >= set(tested) - {"megatron-core"}


def run_script(
    folder: Path, *arguments: str, script: str = "run_70b.sh", nodes: int = 2, gpus: int = 0
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    log = folder / "srun.log"
    log.touch()
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "SRUN_LOG": str(log),
        "VENV": str(folder / "none"),
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_JOB_NODELIST": f"n[1-{nodes}]",
        "SLURM_GPUS_ON_NODE": str(gpus),
    }
    command = ["bash", str(REPOSITORY / "examples" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done, log.read_text().split("\0")[:-1]


@pytest.fixture
def settings(tiny_model, tmp_path) -> list[str]:
    words = tmp_path / "words.jsonl"
    words.write_text('{"prompt": "w5 w6 w7"}\n{"prompt": "w8 w9"}\n')
    small = ["parallel.tp=1", "parallel.pp=2", "parallel.sequence_parallel=false", "precision.dtype=fp32"]
    small += ["rollout.prompts_per_step=2", "rollout.max_prompt_tokens=128", "rollout.max_response_tokens=4"]
    small += [f"prompts.path={words}", "prompts.require_answer=false"]
    return [f"model.hf_path={tiny_model('llama')}", f"run.output_dir={tmp_path / 'run'}", *small]


def test_every_command_of_the_script_runs_in_the_image(settings, tmp_path):
    done, calls = run_script(tmp_path, "--image", "/i.sqsh", "--mounts", "/models:/models", *settings)
    assert done.returncode == 0, done.stderr
    options = f"--container-image=/i.sqsh --container-mounts={REPOSITORY}:{REPOSITORY},/models:/models"
    assert all(f"{options} --container-workdir={REPOSITORY} " in call for call in calls)
    ran = [re.search(r"cli (check|preflight|outcome|train)", call) for call in calls]
    assert [found and found[1] for found in ran] == ["check", "preflight", "outcome", "train"]
    assert calls[-1].startswith("--kill-on-bad-exit=1 ")
    assert " 10.0.0.1 " in calls[-1]  # the first node's address


def test_without_an_image_srun_has_no_option_of_containers(settings, tmp_path):
    done, calls = run_script(tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    assert len(calls) == 2
    assert calls[0].startswith("--ntasks=2 --ntasks-per-node=1 --cpu-bind=none --wait=10 ")
    assert "cli preflight" in calls[0]
    assert calls[1].startswith("--kill-on-bad-exit=1 --cpu-bind=none bash -c ")


def test_a_split_job_trains_on_its_first_nodes_and_serves_on_its_last(settings, tmp_path):
    more = ["rollout.vllm.python=" + sys.executable, "rollout.prompts_per_step=12"]
    done, calls = run_script(
        tmp_path, "--preflight", "off", *settings, *more, script="run_70b_vllm.sh", nodes=5, gpus=4
    )
    assert done.returncode == 0, done.stderr
    assert "12 processes = tp 1 x cp 1 x pp 2 x dp 6" in done.stdout or "refused" in done.stdout, done.stdout
    serving, training = sorted(calls, key=lambda call: "cli serve" not in call)  # the one is in the background
    assert serving.startswith("--overlap --nodes=2 --relative=3 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none ")
    assert "cli serve" in serving
    assert "rollout.vllm.start=2" in serving
    assert training.startswith("--nodes=3 --relative=0 --ntasks=3 --ntasks-per-node=1 --kill-on-bad-exit=1 ")
    assert "rollout.vllm.start=2" in training


@pytest.mark.parametrize("where", ["command", "config"])
def test_a_server_that_needs_more_gpus_than_a_node_has_is_refused(tmp_path, where):
    config = tmp_path / "own.yaml"
    config.write_text("rollout: {vllm: {tp: 8}}" if where == "config" else "rollout:")
    more = [] if where == "config" else ["rollout.vllm.tp=8"]
    done, calls = run_script(tmp_path, "--servers", "1", "--recipe", str(config), *more, gpus=4)
    said = "error: rollout.vllm.tp=8: a server is on one node, and a node has 4 GPUs; take a smaller one"
    assert (done.returncode, done.stderr.strip(), calls) == (2, said, [])


@pytest.mark.slow
def test_one_task_of_srun_per_gpu_and_no_preflight_where_that_is_asked_for(settings, tmp_path):
    asked = ("--launcher", "srun", "--preflight", "off")
    done, calls = run_script(tmp_path, *asked, *settings, "parallel.pp=4", gpus=4)
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call.startswith("--ntasks=8 --ntasks-per-node=4 --cpu-bind=none --kill-on-bad-exit=1 ")
    assert "megatron_powerflow.cli train " in call


@pytest.mark.slow
def test_one_node_trains_the_7b_with_its_own_recipe(settings, tmp_path):
    done, calls = run_script(tmp_path, *settings, "parallel.pp=4", script="run_7b.sh", nodes=1, gpus=4)
    assert done.returncode == 0, done.stderr
    assert "4 processes = tp 1 x cp 1 x pp 4 x dp 1" in done.stdout
    assert "recipes/qwen25_math_7b.yaml" in calls[-1]
    assert calls[0].startswith("--ntasks=4 --ntasks-per-node=4 ")


def test_options_that_mean_nothing_are_refused(tmp_path):
    known = "--recipe NAME|FILE.yaml, --image IMAGE, --mounts FROM:TO,..., --launcher torchrun|srun, "
    known += "--preflight SECONDS|off and --servers NODES|colocated are"
    for arguments, said in (
        (["--mounts", "/models:/models"], "error: --mounts has no effect without --image"),
        (["--imag", "x"], f"error: --imag x is no option of this script: {known}"),
        (["--launcher", "mpirun"], f"error: --launcher mpirun is no option of this script: {known}"),
        (["--recipe"], f"error: --recipe  is no option of this script: {known}"),
    ):
        done, calls = run_script(tmp_path, *arguments)
        assert (done.returncode, done.stderr.strip(), calls) == (2, said, [])
