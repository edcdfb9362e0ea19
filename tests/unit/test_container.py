"""The Dockerfile pins what is tested and what its base image brings; run_70b.sh runs every command in the image."""

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
# Stands for srun with pyxis, which is not here: notes its options, and runs what is no training.
SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$*" >> "$SRUN_LOG"
case "$*" in *torch.distributed.run*) exit 0 ;; esac
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


def run_script(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
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
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    script = ["bash", str(REPOSITORY / "examples" / "run_70b.sh"), *arguments]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    return done, log.read_text().split("\0")[:-1]


@pytest.fixture
def settings(tiny_model, tmp_path) -> list[str]:
    words = tmp_path / "words.jsonl"
    words.write_text('{"prompt": "w5 w6 w7"}\n{"prompt": "w8 w9"}\n')
    small = ["parallel.tp=1", "parallel.pp=2", "parallel.sequence_parallel=false", "precision.dtype=fp32"]
    small += ["rollout.prompts_per_step=2", "rollout.max_prompt_tokens=128", "rollout.max_response_tokens=4"]
    small += [f"prompts.path={words}", "prompts.require_answer=false", "parallel.micro_batch_size=2"]
    return [f"model.hf_path={tiny_model('llama')}", f"run.output_dir={tmp_path / 'run'}", *small]


def test_every_command_of_the_script_runs_in_the_image(settings, tmp_path):
    done, calls = run_script(tmp_path, "--image", "/i.sqsh", "--mounts", "/models:/models", *settings)
    assert done.returncode == 0, done.stderr
    options = f"--container-image=/i.sqsh --container-mounts={REPOSITORY}:{REPOSITORY},/models:/models"
    assert all(f"{options} --container-workdir={REPOSITORY} " in call for call in calls)
    ran = [re.search(r"cli (check|outcome|train)", call) for call in calls]
    assert [found and found[1] for found in ran] == ["check", "outcome", "train"]
    assert calls[-1].startswith("--kill-on-bad-exit=1 ")
    assert " 10.0.0.1 " in calls[-1]  # the first node's address


def test_without_an_image_srun_has_no_option_of_containers(settings, tmp_path):
    done, calls = run_script(tmp_path, *settings)
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call.startswith("--kill-on-bad-exit=1 bash -c ")


def test_options_that_mean_nothing_are_refused(tmp_path):
    for arguments, said in (
        (["--mounts", "/models:/models"], "error: --mounts has no effect without --image"),
        (["--imag", "x"], "error: --imag is no option of this script; --recipe, --image and --mounts are"),
    ):
        done, calls = run_script(tmp_path, *arguments)
        assert (done.returncode, done.stderr.strip(), calls) == (2, said, [])
