"""How do processes become one run? A launch and a layout -> process groups, device, seeds.

Validation has happened before: by the time a process group exists, the run is known to be possible.

Left out: what the launcher says (`launch.py`) and where the processes meet (`rendezvous.py`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from megatron_powerflow.errors import UserError
from megatron_powerflow.former_names import former_names_of
from megatron_powerflow.parallel.device_sums import set_device_sums
from megatron_powerflow.parallel.devices import no_device, own_device, shared_devices
from megatron_powerflow.parallel.launch import Launch, gpus_meant, grow_segments
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.parallel.meeting import MEETING, meeting
from megatron_powerflow.parallel.rendezvous import not_found, rendezvous, take_interface

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from megatron_powerflow.parallel.groups import Groups
else:  # names of 0.1.0, until 0.3
    __getattr__ = former_names_of(__name__)

TIMEOUT = timedelta(minutes=30)


def prepare_imports() -> None:
    """Call before anything imports torch or megatron.core: sets torch's allocator up, installs the CPU layer where
    there is no CUDA, and keeps Megatron's notices about packages a CPU run does without ("Apex is not installed", per
    module) off the screen.

    Raises UserError where a GPU is meant and torch sees none."""
    grow_segments()
    import torch

    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    for library in ("megatron", "torch.utils.cpp_extension"):  # the latter: no GPU beside a CUDA compiler
        logging.getLogger(library).setLevel(logging.ERROR)
    refuse_without_device()
    if not torch.cuda.is_available():
        from megatron_powerflow.parallel import cpu_gloo

        cpu_gloo.install()


def refuse_without_device() -> None:
    """Raise RankError where a GPU is meant and torch sees none."""
    import torch

    if not torch.cuda.is_available() and (meant := gpus_meant()):
        raise no_device(meant, torch.__version__, torch.version.cuda)


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
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_powerflow.parallel.device_memory import first_messages

    set_device_sums(deterministic=deterministic)
    use_cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if use_cuda:
        device = torch.device("cuda", own_device(launch.local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    try:
        with _connected(launch, "nccl" if use_cuda else "gloo"):
            control = control_groups(launch.rank, layout)
            split_world(layout)
            torch.manual_seed(seed)
            model_parallel_cuda_manual_seed(seed)
            groups = model_groups(launch.rank, layout, device, control)
            if use_cuda:
                refuse_shared(str(torch.cuda.get_device_properties(device).uuid), groups)
            first_messages(groups)
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


def split_world(layout: Layout) -> None:
    """Make Megatron's process groups of this layout, after `control_groups`. Collective over all ranks."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=int(TIMEOUT.total_seconds() // 60),
    )


class ControlGroups(NamedTuple):
    """The groups over host memory: of all ranks, of this rank's pipeline, of those that share experts with it."""

    world: dist.ProcessGroup
    pp: dist.ProcessGroup
    ep: dist.ProcessGroup


def control_groups(rank: int, layout: Layout, backend: str = "gloo") -> ControlGroups:
    """Make the groups over host memory, those of this rank alone: with 64 ranks there would be 64 of one rank each.

    Before Megatron makes its groups: the name of a group that only its own ranks make contains the number of groups
    that the rank has by then, which differs between stages afterwards.
    """
    import torch.distributed as dist

    world = dist.new_group(backend=backend, timeout=TIMEOUT)
    model_ranks = layout.tp * layout.cp * layout.dp
    pipeline = tuple(range(rank % model_ranks, layout.world_size, model_ranks))
    (sharing,) = (tuple(ranks) for ranks in layout.expert_ranks if rank in ranks)
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for ranks in dict.fromkeys([pipeline, sharing]):
        made[ranks] = dist.new_group(list(ranks), backend=backend, timeout=TIMEOUT, use_local_synchronization=True)
    return ControlGroups(world, made[pipeline], made[sharing])


def model_groups(rank: int, layout: Layout, device: torch.device, control: ControlGroups) -> Groups:
    """Return this rank's process groups, after `split_world`."""
    from megatron.core import parallel_state

    from megatron_powerflow.parallel.groups import Groups

    return Groups(
        rank=rank,
        world_size=layout.world_size,
        device=device,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        ep=parallel_state.get_expert_model_parallel_group(),
        edp=parallel_state.get_expert_data_parallel_group(),
        tp_dp=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        control=control.world,
        pp_control=control.pp,
        ep_control=control.ep,
    )
