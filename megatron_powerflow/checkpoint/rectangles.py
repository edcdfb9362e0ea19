"""How does a run of a flattened tensor become rectangles of the tensor? And how does torch's checkpoint ask for them?

A run of elements, in the order in which they lie, is the rest of a row, whole rows, and the beginning of a row; with
more axes the rest of a row is such a run again. torch's checkpoint stores and loads rectangles of any sizes, as long as
all ranks' together are the tensor.

Left out: whose runs they are (`moments.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Rectangle(NamedTuple):
    """A part of a tensor: where it begins and how far it goes along each axis, and its first element's place in the
    flattened tensor."""

    offset: tuple[int, ...]
    extent: tuple[int, ...]
    first: int


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[Rectangle]:
    """Yield the rectangles that the elements start, ..., stop - 1 of a flattened tensor are, in their order.

    At most 2 n - 1 of them for n axes. 0 <= start <= stop <= the tensor's elements.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield Rectangle((start,), (stop - start,), start)
        return
    inner = math.prod(shape[1:])
    row, within = divmod(start, inner)
    if within or stop - start < inner:
        end = min(stop, (row + 1) * inner)
        for part in rectangles(shape[1:], within, end - row * inner):
            yield Rectangle((row, *part.offset), (1, *part.extent), row * inner + part.first)
        start, row = end, row + 1
    if whole := (stop - start) // inner:
        yield Rectangle((row, *(0 for _ in shape[1:])), (whole, *shape[1:]), start)
        start, row = start + whole * inner, row + whole
    for part in rectangles(shape[1:], 0, stop - start):
        yield Rectangle((row, *part.offset), (1, *part.extent), start + part.first)


class HeldRectangles:
    """What a rank holds of one tensor of a checkpoint. parts: by their offsets in it; each has as many axes as it.

    The methods with underscores are those by which torch's planners ask (`torch.distributed._checkpointable`).
    """

    def __init__(self, shape: tuple[int, ...], parts: Mapping[tuple[int, ...], Tensor] = MappingProxyType({})) -> None:
        self.shape, self.parts = shape, dict(parts)

    def size(self) -> torch.Size:
        """Return the size of the whole tensor."""
        return torch.Size(self.shape)

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(offsets=torch.Size(offset), sizes=part.size()) for offset, part in self.parts.items()
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties.create_from_tensor(part), size=self.size()
                ),
            )
            for chunk, part in zip(self.__create_chunk_list__(), self.parts.values(), strict=True)
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "a part has a place"
        return self.parts[tuple(index.offset)]


class RectanglePlanner(DefaultLoadPlanner):
    """Loads into `HeldRectangles`, by name. torch's own takes copies of what it does not know, and looks for parts in
    tensors only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)
