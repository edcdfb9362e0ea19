"""How is one process a rank of a world that is not there?

torch's "fake" process group has any number of ranks and sends nothing; on the device `meta` a tensor has a shape and a
dtype and no memory. So this process makes the process groups, the modules and the collectives of rank 37 of 64, of the
sizes that they have there, without a number in them.

Left out: that ranks agree. A hang, or two ranks that disagree about a shape, is not seen here: `powerflow prove`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # gives collectives of meta tensors an implementation
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import FakeWork
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import control_groups, model_groups, split_world, tear_down
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.rehearsal.live_bytes import COALESCED

DEVICE = torch.device("meta")


@contextlib.contextmanager
def fake_world(layout: Layout, rank: int) -> Iterator[Groups]:
    """Make this process one rank of the layout's world. After `prepare_imports`; one at a time."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        control = control_groups(rank, layout, "fake")
        split_world(layout)
        model_parallel_cuda_manual_seed(0)  # nothing is drawn, but Megatron's layers ask for the generators
        yield model_groups(rank, layout, DEVICE, control)
    finally:
        tear_down()


def group_names(groups: Groups) -> dict[str, str]:
    """Return the name of each process group that traffic is told apart by: torch's name -> ours."""
    with_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    named = {"world": dist.group.WORLD, "control": groups.control, "tp x dp": groups.tp_dp, "cp x dp": with_cp}
    named |= {"dp": groups.dp}
    named |= {"edp": groups.edp, "ep": groups.ep, "cp": groups.cp, "pp": groups.pp, "tp": groups.tp}
    return {group.group_name: name for name, group in named.items()}


def implement_coalesced() -> None:
    """Give the collectives of several tensors an implementation on `meta`, where torch has none. Once in a process.

    They change nothing of a shape: finished work is all that they return.
    """
    for operator in COALESCED:
        torch.library.impl(operator.name(), "Meta")(lambda *arguments: FakeWork().boxed())
