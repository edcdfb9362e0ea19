"""How does a rank of a distributed optimizer save and load its own part of the moments, without the other ranks?

Megatron's DistributedOptimizer gives each data-parallel rank a run of the flattened parameters, which may begin and end
within a row of one. Its own format for any layout, "fully_reshardable", gathers all runs on every rank, in host memory:
for a 70B at tp 8 x pp 4 that is 27 GB a process, while training waits. Here a run is written as the rectangles that it
is. What lies on the disk has the same keys, shapes and numbers, so that each reads what the other wrote.

Left out: the optimizer's few other numbers (`storage.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megatron_powerflow.checkpoint.contents import Piece
from megatron_powerflow.checkpoint.rectangles import HeldRectangles, RectanglePlanner, rectangles

PREFIX = "optimizer.state"
MAIN = "param"  # Megatron's word for the fp32 copy that a distributed optimizer moves; without one it is fp32_param
MAIN_ALONE = "fp32_param"
STATES = (MAIN, "exp_avg", "exp_avg_sq")

Held = dict[str, HeldRectangles]  # by the checkpoint's names


def held_moments(optimizers: list[DistributedOptimizer], model_state: Mapping, *, to_save: bool) -> Held:
    """Return this rank's runs of main weights and moments: views of the optimizers' own tensors.

    model_state: the sharded state of the chunks, whose data are the parameters. to_save: only what no other rank saves,
    of those that hold a parameter alike.
    """
    shards: dict[Tensor, ShardedTensor | ShardedTensorFactory] = {
        shard.data: shard
        for shard in nested_values(dict(model_state))
        if isinstance(shard, ShardedTensor | ShardedTensorFactory)
    }
    found: Held = {}
    for optimizer in optimizers:
        for parameter, run in _runs(optimizer):
            states = optimizer._get_main_param_and_optimizer_states(parameter)
            covered = 0
            for part in _parts(shards[parameter]):
                first = part.data.storage_offset() - parameter.storage_offset()
                assert part.data.is_contiguous(), f"{part.key}: a part that does not lie together"
                start, stop = max(run.start - first, 0), min(run.end - first, part.data.numel())
                covered += max(stop - start, 0)
                if to_save and any(part.replica_id[:-1]):  # the last of its numbers counts replicas, which share runs
                    continue
                for offset, extent, at in rectangles(part.data.shape, start, stop):
                    place = _global_place(part, offset)
                    whole = (1,) * part.prepend_axis_num + extent
                    begin = first + at - run.start
                    for name in STATES:
                        held = found.setdefault(f"{PREFIX}.{name}.{part.key}", HeldRectangles(tuple(part.global_shape)))
                        held.parts[place] = states[name].detach()[begin : begin + math.prod(extent)].view(whole)
            assert covered == run.end - run.start, f"{covered} of the elements {run.start} to {run.end} are known"
    return found


def moment_pieces(held: Held) -> Iterator[Piece]:
    """Yield the parts for the sums of `contents.py`."""
    for name, tensor in held.items():
        for offset, data in tensor.parts.items():
            yield Piece(name, data, tensor.shape, offset)


def load_moments(folder: Path, metadata: Metadata, held: Held, *, with_main: bool) -> None:
    """Read this rank's runs into the optimizers' tensors; not collective.

    metadata: of the folder. with_main: False in fp32, where the main weights are the weights, which are loaded already.
    A checkpoint of an optimizer that is not distributed has the main weights under another name. Raises what torch
    raises.
    """
    wanted: dict[str, Any] = {}
    for name, tensor in held.items():
        if not name.startswith(f"{PREFIX}.{MAIN}."):
            wanted[name] = tensor
        elif with_main:
            other = name.replace(f"{PREFIX}.{MAIN}.", f"{PREFIX}.{MAIN_ALONE}.", 1)
            wanted[other if other in metadata.state_dict_metadata else name] = tensor
    if wanted:
        dcp.load(wanted, storage_reader=dcp.FileSystemReader(folder), planner=RectanglePlanner(), no_dist=True)


def _runs(optimizer: DistributedOptimizer) -> Iterator[tuple[Tensor, Any]]:
    """Yield each parameter of which this rank moves a part, and that part's (start, end) of it, flattened."""
    for of_dtype in optimizer.gbuf_ranges:
        for buckets in of_dtype.values():
            for bucket in buckets:
                for parameter, places in bucket["param_map"].items():
                    yield parameter, places["param"]


def _parts(shard: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Return the tensors of the checkpoint that a parameter is: views of it, one behind the other."""
    state: dict[str, Any] = {"shard": shard}
    apply_factories(state)
    return [part for part in nested_values(state) if isinstance(part, ShardedTensor)]


def _global_place(part: ShardedTensor, offset: tuple[int, ...]) -> tuple[int, ...]:
    leading = part.prepend_axis_num
    begin = tuple(part.global_offset)
    return (*begin[:leading], *(there + here for there, here in zip(begin[leading:], offset, strict=True)))
