"""How do processes become one run? A launch and a layout -> process groups, device, seeds.

Validation has happened before: by the time a process group exists, the run is known to be possible.

Left out: what the launcher says (`launch.py`) and where the processes meet (`rendezvous.py`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_powerflow.errors import UserError
from megatron_powerflow.former_names import former_names_of
from megatron_powerflow.parallel.device_sums import set_device_sums
from megatron_powerflow.parallel.devices import no_device, own_device, shared_devices
from megatron_powerflow.parallel.launch import Launch, gpus_meant
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.parallel.meeting import MEETING, meeting
from megatron_powerflow.parallel.rendezvous import not_found, rendezvous, take_interface

if TYPE_CHECKING:
    from megatron_powerflow.parallel.groups import Groups
else:  # names of 0.1.0, until 0.3
    __getattr__ = former_names_of(__name__)

TIMEOUT = timedelta(minutes=30)


def prepare_imports() -> None:
    """Call before anything imports megatron.core: installs the CPU layer where there is no CUDA, and keeps
    Megatron's notices about packages a CPU run does without ("Apex is not installed", per module) off the screen.

    Raises UserError where a GPU is meant and torch sees none."""
    import torch

    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    for library in ("megatron", "torch.utils.cpp_extension"):  # the latter: no GPU beside a CUDA compiler
        logging.getLogger(library).setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        if meant := gpus_meant():
            raise no_device(meant, torch.__version__, torch.version.cuda)
        from megatron_powerflow.parallel import cpu_gloo

        cpu_gloo.install()


def describe_device() -> str:
    """What this process computes on, in one line for people."""
    import torch

    if torch.cuda.is_available():
        return f"device    {torch.cuda.get_device_name()}, one for each process"
    return f"device    the CPU, over gloo: torch {torch.__version__} sees no GPU"


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
    device = torch.device("cpu")
    if use_cuda:
        device = torch.device("cuda", own_device(launch.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
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
        if use_cuda:
            refuse_shared(str(torch.cuda.get_device_properties(device).uuid), groups)
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

    if launch.world_size == 1:  # of torchrun and srun too: nobody needs to find it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield
        return
    store = rendezvous(launch, MEETING)
    take_interface(launch)
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
        raise not_found(launch, error) from None


def refuse_shared(name: str, groups: Groups) -> None:
    """Refuse ranks that have the same GPU, which NCCL would only do within the first collective. Collective.

    name: of this rank's GPU. Raises UserError on every rank alike.
    """
    import torch.distributed as dist

    names: list[str] = [""] * groups.world_size
    dist.all_gather_object(names, name, group=groups.control)
    if shared := shared_devices(names):
        raise UserError(shared)


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
