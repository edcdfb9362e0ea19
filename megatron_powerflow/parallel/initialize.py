"""How does one process find the others? torchrun, srun or alone -> process groups, device, seeds.

With `slurm_job.py` and `device_sums.py` the only module that reads the environment. Validation has happened before: by
the time a process group exists, the run is known to be possible.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.device_sums import set_device_sums
from megatron_powerflow.parallel.interfaces import interface_towards
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.parallel.meeting import MEETING, meeting
from megatron_powerflow.redaction import SECRET_NAME, redacted

if TYPE_CHECKING:
    from megatron_powerflow.parallel.groups import Groups

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher says about this process. No torch needed."""

    launcher: str  # "torchrun", "srun" or "alone"
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = Launch("alone", 0, 1, 0, 1)


def environment_secrets() -> list[str]:
    """The values of the environment's keys, tokens and passwords, by the variables' names (WANDB_API_KEY, HF_TOKEN).

    A path is none: it says where a key lies.
    """
    return [v for name, v in os.environ.items() if SECRET_NAME.search(name) and not v.startswith(("/", ".", "~"))]


def command_line(*words: str) -> str:
    """What was typed, for files and logs: words that can be typed again, but for the secrets among them."""
    return redacted(shlex.join(words), environment_secrets())


def read_launch() -> Launch:
    """torchrun's variables first, then srun's; without either this process is alone."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env or ("RANK" in env and "WORLD_SIZE" in env and "MASTER_ADDR" in env):
        return Launch(
            "torchrun",
            int(env["RANK"]),
            int(env["WORLD_SIZE"]),
            int(env.get("LOCAL_RANK", 0)),
            int(env.get("LOCAL_WORLD_SIZE", 1)),
        )
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env and "SLURM_STEP_NODELIST" in env:
        return Launch(
            "srun",
            int(env["SLURM_PROCID"]),
            int(env["SLURM_STEP_NUM_TASKS"]),
            int(env["SLURM_LOCALID"]),
            int(env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]),
        )
    return ALONE


def settings_that_count() -> dict[str, str]:
    """Environment variables of other libraries that change where a run takes place, those that are set."""
    names = (
        "CUDA_VISIBLE_DEVICES",
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
        "NVIDIA_TF32_OVERRIDE",
        "HF_HOME",
        "HF_ENDPOINT",
        "HF_HUB_OFFLINE",
    )
    return {name: os.environ[name] for name in names if name in os.environ}


def prepare_imports() -> None:
    """Call before anything imports megatron.core: installs the CPU layer where there is no CUDA, and keeps
    Megatron's notices about packages a CPU run does without ("Apex is not installed", per module) off the screen."""
    import torch

    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    for library in ("megatron", "torch.utils.cpp_extension"):  # the latter: no GPU beside a CUDA compiler
        logging.getLogger(library).setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        from megatron_powerflow.parallel import cpu_gloo

        cpu_gloo.install()


@contextlib.contextmanager
def initialized(layout: Layout, launch: Launch, *, seed: int, deterministic: bool = False) -> Iterator[Groups]:
    """Process groups for the layout, as a `Groups`; torn down at a clean end. After `prepare_imports`.

    Where the block raises they are left to the end of the process: tearing them down can wait for ranks that are gone.

    deterministic: whether sums are repeatable on GPUs too (`device_sums.py`).

    Reproducible: seeds torch's and Megatron's generators, although nothing in a run draws from them
    (see rollout/sampling.py).
    """
    import torch
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    set_device_sums(deterministic=deterministic)
    use_cuda = torch.cuda.is_available()
    if use_cuda and launch.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {launch.local_rank} has no GPU of its own: {torch.cuda.device_count()} on this node; "
            "start one process per GPU"
        )
    if use_cuda:
        torch.cuda.set_device(launch.local_rank)
    device = torch.device("cuda", launch.local_rank) if use_cuda else torch.device("cpu")
    try:
        with _connected(launch, "nccl" if use_cuda else "gloo"):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                create_gloo_process_groups=False,
                distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
            )
            torch.manual_seed(seed)
            model_parallel_cuda_manual_seed(seed)
            groups = _groups(launch, layout, device)
        yield groups
    except BaseException:
        if launch.world_size > 1:
            raise
        tear_down()
        raise
    tear_down()


def tear_down() -> None:
    """Take down what `initialized` or `cpu_group` has set up, if anything."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@contextlib.contextmanager
def cpu_group(launch: Launch) -> Iterator[None]:
    """Only torch's default process group, over gloo, for what needs no model; none at all for a process alone."""
    import torch.distributed as dist

    if launch.world_size == 1:
        yield
        return
    with _connected(launch, "gloo"):
        pass
    yield
    dist.destroy_process_group()  # at a clean end, as in `initialized`


@contextlib.contextmanager
def _connected(launch: Launch, backend: str) -> Iterator[None]:
    """Make torch's default process group; the ranks look after each other while the block makes groups of it.

    Raises UserError where the processes do not find each other.
    """
    import torch.distributed as dist

    if launch.launcher == "alone":
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield
        return
    _bind_interface(launch)
    store = rendezvous(launch, MEETING)
    is_connected = False
    try:
        with meeting(launch.rank, launch.world_size, store):
            store.set_timeout(TIMEOUT)
            dist.init_process_group(
                backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=TIMEOUT
            )
            is_connected = True
            yield
    except (RuntimeError, ValueError) as error:  # of torch's store and of gloo: no classes of their own
        if is_connected:
            raise
        raise _not_found(launch, error) from None


def _bind_interface(launch: Launch) -> None:
    """gloo takes the interface that leads to rank 0, unless the user named another."""
    interface = interface_towards(_address(launch)[0])
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _address(launch: Launch) -> tuple[str, int | str]:
    """Where rank 0 is to be found."""
    if launch.launcher == "srun":
        return _srun_rendezvous()
    return os.environ.get("MASTER_ADDR", "localhost"), os.environ.get("MASTER_PORT", "")


def _not_found(launch: Launch, error: Exception) -> UserError:
    host, port = _address(launch)
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    return UserError(
        f"rank {launch.rank} does not find the other processes at MASTER_ADDR={host}, port {port} "
        f"({' '.join(str(error).split())[:300]}); see that all of them run, that this node reaches that address, and "
        f"that GLOO_SOCKET_IFNAME={interface} names the interface that leads there"
    )


def rendezvous(launch: Launch, timeout: timedelta):
    """A key-value store of all processes. Under srun it is the main process's, and ends with its hold of it. Raises
    UserError where that one is not found."""
    import torch.distributed as dist

    try:
        if launch.launcher == "torchrun":
            store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=timeout))
            # the store is torchrun's: after --max-restarts it still holds the addresses of ranks that are gone
            return dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        host, port = _srun_rendezvous()
        return dist.TCPStore(
            host, port, launch.world_size, is_master=launch.rank == 0, timeout=timeout, wait_for_workers=False
        )
    except (RuntimeError, ValueError) as error:
        raise _not_found(launch, error) from None


def _groups(launch: Launch, layout: Layout, device):
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_powerflow.parallel.groups import Groups

    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    model_ranks = layout.tp * layout.cp * layout.dp
    pp_control = _gloo_group(launch, [range(i, layout.world_size, model_ranks) for i in range(model_ranks)])
    ep_control = _gloo_group(launch, layout.expert_ranks)
    return Groups(
        rank=launch.rank,
        world_size=launch.world_size,
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        edp=parallel_state.get_expert_data_parallel_group(),
        tp_dp=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        control=control,
        pp_control=pp_control,
        ep_control=ep_control,
    )


def _gloo_group(launch: Launch, members: Sequence[Sequence[int]]):
    """The one of these groups that this rank is in; every rank takes part in making every group."""
    import torch.distributed as dist

    mine = None
    for ranks in members:
        group = dist.new_group(list(ranks), backend="gloo", timeout=TIMEOUT)
        if launch.rank in ranks:
            mine = group
    return mine


def _srun_rendezvous() -> tuple[str, int]:
    """Address of the step's first node, and a port that follows from the job and step ids.

    NodeAddr is asked of SLURM, because node names need not resolve. MASTER_ADDR and MASTER_PORT win.
    """
    env = os.environ
    # below 32768, from where the kernel takes ports for outgoing connections
    port = int(env.get("MASTER_PORT", 20000 + (int(env["SLURM_JOB_ID"]) * 31 + int(env["SLURM_STEP_ID"])) % 12000))
    if "MASTER_ADDR" in env:
        return env["MASTER_ADDR"], port
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
        ).stdout.split()
        node = subprocess.run(["scontrol", "show", "node", names[0]], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"srun without MASTER_ADDR, and scontrol does not answer ({error}); set MASTER_ADDR") from None
    addresses = [word.removeprefix("NodeAddr=") for word in node.split() if word.startswith("NodeAddr=")]
    return (addresses or names)[0], port
