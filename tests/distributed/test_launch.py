"""Starts that cannot become a run end with exit code 2 and say why; some that look odd are runs. Real processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.free_ports import free_port
from tests.unit.test_launch import PTY

pytestmark = pytest.mark.slow
MEETING = """
from megatron_powerflow.cli.leaving import exit_codes
from megatron_powerflow.parallel import rendezvous
from megatron_powerflow.parallel.initialize import initialized, prepare_imports, refuse_shared
from megatron_powerflow.parallel.launch import read_launch
from megatron_powerflow.parallel.layout import Layout

rendezvous.RESOLVING_SECONDS = 2

def program():
    launch = read_launch()
    prepare_imports()
    layout = Layout(1, 1, None, 1, 1, launch.world_size, False)
    with initialized(layout, launch, seed=0) as groups:
        {inside}
        print(f"rank {{groups.rank}} of {{groups.world_size}}")

exit_codes(program)
"""


def start(inside: str = "pass", **variables: str) -> subprocess.Popen[str]:
    ours = ("SLURM_", "OMPI_", "PMI_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "CUDA_VISIBLE_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.Popen(
        [sys.executable, "-c", MEETING.format(inside=inside)],
        env={**clean, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    said, errors = process.communicate(timeout=300)
    return process.returncode, said, errors


@pytest.fixture
def taken():
    """A port of this machine at which another program listens."""
    with closing(socket.socket()) as listener:
        port = free_port()
        listener.bind(("0.0.0.0", port))
        listener.listen()
        yield str(port)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_port_that_is_taken_is_said(taken, launcher):
    ours = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    step = PTY | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    launch = ours if launcher == "torchrun" else step
    code, said, errors = end_of(start(**launch, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken))
    assert (code, said) == (2, ""), errors
    assert f"error: rank 0 cannot listen at port {taken} of {socket.gethostname()}: the port is taken" in errors
    assert "Traceback" not in errors


def test_an_address_that_does_not_resolve_is_said():
    """By the rank that cannot resolve it: rank 0's own node may well know its name."""
    ours = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    code, said, errors = end_of(start(**ours, MASTER_ADDR="no-such-node.invalid", MASTER_PORT="29500"))
    assert (code, said) == (2, ""), errors
    assert f"error: MASTER_ADDR=no-such-node.invalid does not resolve on {socket.gethostname()}" in errors
    assert "Traceback" not in errors


def test_one_task_of_srun_is_a_run_without_scontrol_or_an_address():
    """As in `srun --pty`, within a container that has none of SLURM's programs."""
    code, said, errors = end_of(start(**PTY, PATH="/nowhere"))
    assert (code, said) == (0, "rank 0 of 1\n"), errors


def test_ranks_that_share_a_gpu_are_refused_together():
    """The names stand for GPUs that are not here; what is sent and refused is the real thing."""
    ours = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for names, code in (("xx", 2), ("xy", 0)):
        started = [
            start(f'refuse_shared("{name}", groups)', RANK=str(rank), LOCAL_RANK=str(rank), **ours)
            for rank, name in enumerate(names)
        ]
        ends = [end_of(process) for process in started]
        assert [end[0] for end in ends] == [code, code], ends
        assert "".join(end[2] for end in ends).count("error: ranks 0, 1 have one GPU, x;") == (code == 2), ends


@pytest.mark.skipif(torch.cuda.is_available(), reason="here a GPU is to be seen")
def test_a_run_that_is_to_have_a_gpu_does_not_take_the_cpu():
    code, said, errors = end_of(start(CUDA_VISIBLE_DEVICES="0,1"))
    assert (code, said) == (2, "")
    assert errors.startswith("error: no GPU is visible, and CUDA_VISIBLE_DEVICES=0,1 says that one is meant; torch ")
    code, said, errors = end_of(start(CUDA_VISIBLE_DEVICES="", SLURM_JOB_GPUS="0,1"))
    assert (code, said) == (0, "rank 0 of 1\n"), errors
