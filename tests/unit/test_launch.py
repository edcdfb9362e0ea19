"""Who started this process: what launchers leave in the environment is read, and what contradicts itself is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.devices import no_device, own_device, shared_devices
from megatron_powerflow.parallel.launch import ALONE, Launch, bind_interface, gpus_meant, launch_of
from tests.conftest import REPOSITORY

PLACE = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **PLACE}
STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_NODELIST": "n[1-3]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
}
PTY = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "1"}
PTY |= {"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "1"}


def mpi(rank: int, size: int, name: str = "OMPI_COMM_WORLD") -> dict[str, str]:
    return {f"{name}_RANK": str(rank), f"{name}_SIZE": str(size)}


@pytest.mark.parametrize(
    ("env", "launch"),
    [
        ({}, ALONE),
        (PLACE, ALONE),  # a script has exported where rank 0 is, and nobody has started ranks
        ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
        (TORCHRUN, Launch("torchrun", 5, 8, 1, 4)),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"} | PTY | mpi(0, 2), Launch("torchrun", 5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2", **PLACE}, Launch("torchrun", 1, 2, 0, 1)),  # a pod each
        (STEP, Launch("srun", 5, 11, 1, 4)),
        (STEP | {"SLURM_NODEID": "2", "SLURM_LOCALID": "0", "SLURM_PROCID": "8"}, Launch("srun", 8, 11, 0, 3)),
        (STEP | PLACE | {"WORLD_SIZE": "11"}, Launch("srun", 5, 11, 1, 4)),
        # enroot's hook for PyTorch images sets these in each task of `srun --container-image`
        (STEP | PLACE | {"RANK": "5", "WORLD_SIZE": "11", "LOCAL_RANK": "1"}, Launch("torchrun", 5, 11, 1, 2)),
        (STEP | mpi(5, 11, "PMI"), Launch("srun", 5, 11, 1, 4)),  # srun --mpi=pmi2
        (PTY, Launch("srun", 0, 1, 0, 1)),
        (mpi(0, 1), ALONE),
        (TORCHRUN | mpi(5, 8), Launch("torchrun", 5, 8, 1, 4)),  # each rank's variables were set from MPI's
        (TORCHRUN | mpi(1, 2), Launch("torchrun", 5, 8, 1, 4)),  # a starter of its own on each of two nodes
    ],
)
def test_what_launchers_leave_is_read(env, launch):
    assert launch_of(env) == launch


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"WORLD_SIZE": "8"}, ["WORLD_SIZE=8, without RANK, MASTER_ADDR, MASTER_PORT", "`unset WORLD_SIZE`"]),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "n1"},
            ["RANK=3 WORLD_SIZE=8 MASTER_ADDR=n1, without MASTER_PORT: torchrun sets all", "`unset RANK WORLD_SIZE`"],
        ),
        ({"LOCAL_RANK": "3"}, ["LOCAL_RANK=3, without RANK, WORLD_SIZE", "this process is alone", "unset LOCAL_RANK"]),
        ({"RANK": "zero", **PLACE}, ["RANK=zero", "without WORLD_SIZE"]),
        (TORCHRUN | {"RANK": "8"}, ["RANK=8 of WORLD_SIZE=8: ranks go from 0 to 7", "unset RANK, WORLD_SIZE"]),
        (TORCHRUN | {"RANK": "-1"}, ["RANK=-1: a number of 0 to 1000000 belongs there"]),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ["LOCAL_RANK=4 of LOCAL_WORLD_SIZE=4"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, ["LOCAL_WORLD_SIZE=16 and WORLD_SIZE=8"]),
        ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", **PLACE}, ["RANK is not set, and other variables"]),
        (mpi(2, 4), ["OMPI_COMM_WORLD_SIZE=4: mpirun has started 4 processes, and each would be a run of its own"]),
        (mpi(0, 4, "PMI"), ["PMI_SIZE=4: mpirun has started 4"]),
        (PTY | mpi(0, 4), ["OMPI_COMM_WORLD_SIZE=4"]),
        # mpirun's daemons are an srun step of one task per node
        (STEP | mpi(17, 88), ["OMPI_COMM_WORLD_SIZE=88"]),
        # exported before srun, the same for each task
        (STEP | TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
         ["RANK=0 and WORLD_SIZE=1, but this is task 5 of the 11 that srun has started"]),
        (STEP | TORCHRUN | {"RANK": "0", "WORLD_SIZE": "11"}, ["but this is task 5 of the 11 that srun"]),
        (TORCHRUN | mpi(5, 16), ["but this is task 5 of the 16 that mpirun has started"]),
        (STEP | {"WORLD_SIZE": "8"}, ["WORLD_SIZE=8, without RANK", "this is task 5 of srun's 11"]),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_by_name(env, said):
    with pytest.raises(UserError) as refused:
        launch_of(env)
    (violation,) = refused.value.violations
    for words in said:
        assert words in violation


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(UserError) as refused:
        launch_of(TORCHRUN | {"RANK": "first", "WORLD_SIZE": "0", "MASTER_PORT": "70000"})
    assert [violation.partition(":")[0] for violation in refused.value.violations] == [
        "RANK=first",
        "WORLD_SIZE=0",
        "MASTER_PORT=70000",
    ]
    with pytest.raises(UserError) as refused:
        launch_of({"WORLD_SIZE": "8", **mpi(1, 4)})
    assert len(refused.value.violations) == 2


def test_a_refused_launch_ends_every_command_with_2_and_brings_no_torch(tmp_path):
    """Each process says so itself: nobody is the main one."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_powerflow.cli", "train", "examples/configs/local.yaml"],
        cwd=REPOSITORY,
        env={**clean, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}", **mpi(2, 4)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: OMPI_COMM_WORLD_SIZE=4: mpirun has started 4 processes")


def test_a_rank_takes_the_only_gpu_that_it_sees_or_that_of_its_number():
    assert [own_device(3, 1), own_device(0, 8), own_device(3, 8)] == [0, 0, 3]
    with pytest.raises(UserError, match="local rank 5 has no GPU of its own: 4 on this node"):
        own_device(5, 4)


def test_ranks_that_have_the_same_gpu_are_named():
    assert shared_devices(["a", "b", "c"]) == []
    (said,) = shared_devices(["a", "b", "a", "c"])
    assert said.startswith("ranks 0, 2 have one GPU, a; ")


@pytest.mark.parametrize(
    ("env", "meant"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, "CUDA_VISIBLE_DEVICES=GPU-8932f937"),
        ({"SLURM_JOB_GPUS": "0,1"}, "SLURM_JOB_GPUS=0,1"),
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_GPUS_PER_NODE": "a100:4"}, "SLURM_GPUS_PER_NODE=a100:4"),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
        # said on purpose, and it decides
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_GPUS": "0"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, None),
    ],
)
def test_a_gpu_is_meant_where_the_job_or_the_user_names_one(monkeypatch, tmp_path, env, meant):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert gpus_meant(tmp_path) == meant


def test_a_gpu_is_meant_on_a_machine_that_has_one(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "CUDA_VISIBLE"))]:
        monkeypatch.delenv(name)
    (tmp_path / "nvidiactl").touch()
    assert gpus_meant(tmp_path) is None
    (tmp_path / "nvidia0").touch()
    assert gpus_meant(tmp_path) == f"this machine's {tmp_path}/nvidia0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_meant(tmp_path) is None


def test_why_torch_sees_no_gpu_is_said():
    (without,) = no_device("SLURM_JOB_GPUS=0", "2.13.0+cpu", None).violations
    assert "SLURM_JOB_GPUS=0 says that one is meant; torch 2.13.0+cpu is built without CUDA" in without
    (blind,) = no_device("SLURM_JOB_GPUS=0", "2.11.0", "13.0").violations
    assert "torch 2.11.0 for CUDA 13.0 finds none: see that nvidia-smi" in blind


@pytest.mark.parametrize("where", ["nowhere", "environment", "file", "comment"])
def test_gloo_and_nccl_take_the_interface_unless_another_is_named(monkeypatch, tmp_path, where):
    """NCCL's `=` is an exact name; its own file, which gives way to the environment, is heeded."""
    named = tmp_path / "nccl.conf"
    monkeypatch.setenv("NCCL_CONF_FILE", str(named))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that what is set is undone
        monkeypatch.delenv(name)
    if where == "environment":
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    if where == "file":
        named.write_text("NCCL_DEBUG=WARN\nNCCL_SOCKET_IFNAME==ens1f0\n")
    if where == "comment":
        named.write_text("# NCCL_SOCKET_IFNAME=ens1f0\n")
    if Path("/etc/nccl.conf").exists():
        pytest.skip("this machine's administrator has a file of NCCL's")
    bind_interface("eth1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1"
    nccl = {"nowhere": "=eth1", "comment": "=eth1", "environment": "^docker", "file": None}
    assert os.environ.get("NCCL_SOCKET_IFNAME") == nccl[where]
