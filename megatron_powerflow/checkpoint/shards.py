"""How do the shards of a state come onto the disk while training goes on? A copy is taken, and a thread writes it.

Megatron plans who writes what (`dist_checkpointing.save`), and spreads what data-parallel ranks share over all of them;
torch's `FileSystemWriter` writes the files. Megatron's own writer forks: a fork holds the sockets of its parent, and
waits for ever when that is killed. A thread ends with its process, and the disk and SHA-256 leave the interpreter free.

Left out: the small files, names and `latest` (`saving.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from megatron_powerflow.checkpoint.contents import Piece
from megatron_powerflow.checkpoint.moments import Held
from megatron_powerflow.checkpoint.rectangles import HeldRectangles


class HeldWriter(FileSystemWriter):
    """Holds what this rank is to write, and writes it when `write` is called, on any thread.

    buffers: host memory of earlier saves, into which the tensors are copied, so that they may change meanwhile; it
    grows as needed. None: they are not copied.
    """

    def __init__(self, folder: Path, *, buffers: dict[Any, Tensor] | None) -> None:
        # nothing is ahead of anything: what is written lies in host memory by then
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0)
        self._buffers = buffers
        self._plan: SavePlan | None = None
        self._held: dict[Any, Any] = {}
        self._results: list | None = None
        self.failure: OSError | None = None  # of the index, which the main rank writes

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Called by Megatron when it is known what this rank writes."""
        self._plan = plan
        for item in plan.items:
            data = planner.resolve_data(item)
            self._held[item.index] = self._copied(item.index, data) if isinstance(data, Tensor) else data

    def _copied(self, index: Any, data: Tensor) -> Tensor:
        """New memory costs as much as the copy: the kernel clears it page by page."""
        if self._buffers is None:
            return data
        buffer = self._buffers.get(index)
        if buffer is None or (buffer.shape, buffer.dtype) != (data.shape, data.dtype):
            buffer = self._buffers[index] = torch.empty(data.shape, dtype=data.dtype, device="cpu")
        return buffer.copy_(data.detach())

    def resolve_data(self, item: WriteItem) -> Any:
        """Called by torch for each item as it is written."""
        return self._held[item.index]

    def write(self) -> None:
        """Write this rank's shards, synced. Raises OSError or RuntimeError."""
        assert self._plan is not None, "Megatron plans before anything is written"
        self._results = self.write_data(self._plan, self).wait()  # type: ignore[arg-type]

    def pieces(self) -> Iterator[Piece]:
        """Yield what this rank writes, as it was when the save began."""
        assert self._plan is not None
        for item in self._plan.items:
            if item.tensor_data is not None:
                shape, offset = tuple(item.tensor_data.size), tuple(item.tensor_data.chunk.offsets)
                yield Piece(item.index.fqn, self._held[item.index], shape, offset)

    def num_bytes(self) -> int:
        """Return the bytes of the tensors that this rank writes."""
        return sum(held.nbytes for held in self._held.values() if isinstance(held, Tensor))

    def release(self) -> None:
        """Let go of what was written; the buffers stay for the next save."""
        self._held.clear()

    def finish(self, metadata: Any, results: list[list]) -> None:
        """Called by Megatron on the main rank, for whose answer the others wait: a failure is kept for `finalize`."""
        try:
            super().finish(metadata, results)
        except OSError as error:
            self.failure = error

    def retrieve_write_results(self) -> list:
        """Called by Megatron when all ranks have written."""
        assert self._results is not None, "asked before the shards were written"
        return self._results


class HeldPlanner(MCoreSavePlanner):
    """Megatron's planner, which finds the parts of `HeldRectangles` as well."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        return held.__get_tensor_shard__(index) if isinstance(held, HeldRectangles) else super().lookup_object(index)


class HeldStrategy(TorchDistSaveShardedStrategy):
    """Megatron's torch_dist with a `HeldWriter` in place of its forking one. The plan of a save is used again as long
    as the state has the same shape.

    moments: of the save to come, which Megatron has not split up.
    """

    cached_central_plan: Any  # Megatron's, which gives them no type
    cached_local_plan: Any
    validated_cache_reuse: Any

    def __init__(self, *, copies: bool) -> None:
        super().__init__("torch_dist", 1, cached_metadata=True)
        self._buffers: dict[Any, Tensor] | None = {} if copies else None
        self.writer: HeldWriter | None = None
        self.moments: Held = {}

    def async_save(self, sharded_state_dict, checkpoint_dir, async_strategy="mcore") -> AsyncRequest:
        """Plan the save, collectively, and hold what this rank writes; `writer.write()` and the request's finalize
        functions remain to be called."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        self.writer = HeldWriter(Path(checkpoint_dir), buffers=self._buffers)
        planned, self.cached_central_plan, self.cached_local_plan, self.validated_cache_reuse, _ = (
            save_state_dict_async_plan(
                {**mcore_to_pyt_state_dict(state, False), **self.moments},
                self.writer,
                None,
                0,
                planner=HeldPlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
                cached_ckpt_structure=(
                    self.cached_central_plan,
                    self.cached_local_plan,
                    self.validated_cache_reuse,
                ),
            )
        )
        writer, metadata, wrapper = planned
        if metadata is not None:
            self.cached_global_metadata = metadata
        elif torch.distributed.get_rank() == 0:
            metadata = self.cached_global_metadata
        return AsyncRequest(None, (), [lambda: save_state_dict_async_finalize(writer, metadata, wrapper)])


class ShardWriter:
    """Saves of one run, one after the other, on this rank."""

    def __init__(self, *, asynchronous: bool) -> None:
        self._held = HeldStrategy(copies=asynchronous)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self._strategy = FullyParallelSaveStrategyWrapper(self._held, group, do_cache_distribution=True)
        self._is_first = True

    def begin(self, state: dict, moments: Held, folder: Path, metadata: dict) -> tuple[HeldWriter, AsyncRequest]:
        """Plan a save of a sharded state, and of moments that Megatron does not split up, and hold it. Collective.

        Then `write` of the writer on each rank, and, when all have done so, `finalize` of the request, collectively.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what other streams have yet to do to the weights
        self._held.moments = moments
        request = dist_checkpointing.save(
            state,
            str(folder),
            sharded_strategy=self._strategy,
            validate_access_integrity=self._is_first,  # the state's shape stays
            async_sharded_save=True,
            content_metadata=metadata,
        )
        self._held.moments, self._is_first = {}, False
        assert request is not None
        assert self._held.writer is not None
        return self._held.writer, request


def finalize(writer: HeldWriter, request: AsyncRequest) -> None:
    """Write the index of the shards. Collective, when all ranks have written theirs.

    Raises OSError on the main rank, which writes these files, where they cannot be written; no rank waits for it then.
    """
    index, *others = request.finalize_fns
    index()
    failure = writer.failure
    for function in others:  # Megatron's: a file of the main rank's, then a barrier
        try:
            function()
        except OSError as error:
            failure = failure or error
            torch.distributed.barrier()  # in which the other ranks are
    if failure is not None:
        raise failure


def host_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in host memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def pieces_of(state: dict) -> Iterator[Piece]:
    """Yield what this rank is the first holder of in a sharded state."""
    apply_factories(state)
    for value in nested_values(state):
        if isinstance(value, ShardedTensor) and is_main_replica(value.replica_id):
            yield Piece(value.key, value.data, tuple(value.global_shape), tuple(value.global_offset))
