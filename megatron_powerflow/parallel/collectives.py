"""Which collectives of tensors and rollouts are our own? The few that Megatron-Core does not have.

Left out: everything that Megatron-Core does itself (gradients, activations between stages in training); small values
that ranks decide by (`together.py`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_powerflow.parallel.groups import Groups


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, group):
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def sum_over(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of `values` over the ranks of `group`, for what all of them go on with alike.

    Each rank has the whole gradient of the sum and hands it to its own share as it is. Collective over `group`.
    """
    return values if dist.get_world_size(group) == 1 else _SumOver.apply(values, group)


class _GatherOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, order, group):
        ctx.group, ctx.length = group, values.shape[0]
        ctx.save_for_backward(order)
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values.contiguous(), group=group)
        return torch.cat(parts).index_select(0, order)

    @staticmethod
    def backward(ctx, grad):
        (order,) = ctx.saved_tensors
        # a sum over the ranks of what each made of this rank's share; gloo has no reduce-scatter
        everyone = torch.empty_like(grad).index_copy_(0, order, grad)
        dist.all_reduce(everyone, group=ctx.group)
        return everyone.narrow(0, dist.get_rank(ctx.group) * ctx.length, ctx.length), None, None


def gather_over(values: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather [t / n, ...] of each of the n ranks of `group` into [t, ...] on all of them.

    order: [t] int64; element i of the result is element order[i] of the shares behind each other. It is for what the
    ranks go on with differently: the gradient of a share is the sum over all of them. Collective over `group`, also in
    the backward pass.
    """
    return _GatherOver.apply(values, order, group)


def from_last_stage(values: Tensor | None, shape: tuple[int, ...], groups: Groups) -> Tensor:
    """Send numbers that the last stage computed to every stage of the replica.

    values: `shape` fp64 on CPU, on the last stage; ignored elsewhere. Returns the same, on every stage. Collective over
    the pipeline's ranks.
    """
    local = values if groups.is_last_stage else torch.empty(shape, dtype=torch.float64)
    assert local is not None and local.shape == shape and local.dtype == torch.float64
    local = local.contiguous()
    source = dist.get_global_rank(groups.pp_control, groups.pp_size - 1)
    dist.broadcast(local, src=source, group=groups.pp_control)
    return local


def last_stage_rows(rows: Tensor | None, num_rows: int, num_columns: int, groups: Groups) -> Tensor:
    """Gather the rows that the last stage of every replica computed, onto every rank, in dp order.

    rows: [num_rows, num_columns] fp64 on CPU, on the last stage; ignored elsewhere. Returns [dp_size * num_rows,
    num_columns] fp64 on CPU, the same on every rank of the world. Collective over the run.
    """
    local = from_last_stage(rows, (num_rows, num_columns), groups)
    everyone = [torch.empty_like(local) for _ in range(groups.world_size)]
    dist.all_gather(everyone, local, group=groups.control)
    # rank = tp + tp_size * (cp + cp_size * (dp + dp_size * pp)), see layout.py; all of a replica hold equal rows
    width = groups.tp_size * groups.cp_size
    replicas = {rank // width % groups.dp_size: its_rows for rank, its_rows in enumerate(everyone)}
    return torch.cat([replicas[dp_rank] for dp_rank in range(groups.dp_size)])


def every_row(rows: Tensor, places: Tensor, groups: Groups) -> Tensor:
    """Gather the rows that each replica has onto every rank, each at its place.

    rows: [n, m] int64 on CPU, alike on all ranks of the replica; every replica has n. places: [n] int64; those of all
    replicas together are 0, ..., dp_size * n - 1. Returns [dp_size * n, m] int64. Uses host memory; a rank sends and
    receives some two times the result, however many ranks there are. Collective over the run.
    """
    assert rows.dtype == torch.int64, "a sum of other numbers with 0 need not be the same number"
    table = rows.new_zeros(groups.dp_size * len(rows), rows.shape[1])
    if groups.speaks_for_replica:
        table[places] = rows
    dist.all_reduce(table, group=groups.control)
    return table


def every_rollout(rollouts: list, groups: Groups) -> list:
    """Gather the rollouts of all samplers onto every rank, by slot, then response.

    It is for a held-out evaluation; what a step trains on goes to the ranks that need it
    (`training/rollout_exchange.py`). rollouts: of this sampler, alike over tp and pp. One rank of each speaks for all.
    Uses host memory. Collective over the run.
    """
    speaks = groups.is_last_stage and groups.tp_rank == 0
    everything: list[list] = [[] for _ in range(groups.world_size)]
    dist.all_gather_object(everything, list(rollouts) if speaks else [], group=groups.control)
    gathered = (rollout for part in everything for rollout in part)
    return sorted(gathered, key=lambda rollout: (rollout.slot, rollout.response_index))
