"""How are the tensors of a torch_dist checkpoint read and written one at a time?

The folder is torch.distributed.checkpoint's: `.metadata`, an index of every chunk of every global tensor, and files
of chunks, each chunk as torch.save wrote it. Megatron-Core adds `metadata.json` and `common.pt`.

Reading takes the chunks of just the part that is asked for, whatever layout wrote them, and nothing is unpickled that
could run code. Writing hands torch's own writer a plan of names, shapes and dtypes, and makes a tensor when its turn
comes: neither holds more than one parameter.

Left out: which parameter is where (`hf/torch_dist_names.py`); Megatron-Core's own saving and loading
(`checkpoint/storage.py`).
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from megatron_powerflow.checkpoint.megatron_version import BACKEND_NAME, COMMON_NAME
from megatron_powerflow.checkpoint.pickle_audit import audit_checkpoint
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.torch_dist_names import StoredSlice
from megatron_powerflow.whole_files import ordinary

BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# checkpoint_version below 2 would have Megatron-LM reorder the attention weights; a release starts at iteration 0.
COMMON = {
    "checkpoint_version": 3.0,
    "iteration": 0,
    "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
}


class TorchDistFolder:
    """The tensors of a torch_dist folder by name.

    Opening it raises UserError when the folder is not one, not complete, or not safe to load.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = audit_checkpoint(folder)
        if not (folder / BACKEND_NAME).is_file():
            raise UserError(f"{folder / BACKEND_NAME}: no such file; the checkpoint is not complete")
        self._stored = {
            (index.fqn, tuple(index.offset or ())): storage for index, storage in self._metadata.storage_data.items()
        }
        self._by_index: dict[tuple[str, int], dict] = {}
        sizes: dict[str, int] = {}
        for storage in self._metadata.storage_data.values():
            sizes[storage.relative_path] = max(sizes.get(storage.relative_path, 0), storage.offset + storage.length)
        violations = []
        for name, needed in sorted(sizes.items()):
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size is None or size < needed:
                state = "no such file" if size is None else f"truncated: {size} bytes of at least {needed}"
                violations.append(f"{folder / name}: {state}; copy the checkpoint again")
        if violations:
            raise UserError(violations)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of every global tensor, those of an optimizer included."""
        return {
            name: (tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read(self, slice_: StoredSlice) -> Tensor:
        """Return tensor[slice_.index], on CPU, put together from the chunks that overlap it.

        Raises UserError where a chunk is missing, damaged or not safe to load.
        """
        entry = self._metadata.state_dict_metadata[slice_.key]
        assert isinstance(entry, TensorStorageMetadata), f"{slice_.key} is none of `tensors()`"
        lead = len(slice_.index)
        start = (*slice_.index, *(0,) * (len(entry.size) - lead))
        stop = (*(i + 1 for i in slice_.index), *entry.size[lead:])
        shape, covered = tuple(entry.size[lead:]), 0
        whole: Tensor | None = None
        for chunk in self._overlapping(slice_.key, entry, slice_.index):
            first = tuple(map(max, start, chunk.offsets))
            last = tuple(min(b, o + s) for b, o, s in zip(stop, chunk.offsets, chunk.sizes, strict=True))
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            data = self._chunk(slice_.key, entry, chunk)
            part = data[tuple(slice(a - o, b - o) for a, b, o in zip(first, last, chunk.offsets, strict=True))]
            part = part[(0,) * lead]
            covered += part.numel()
            if tuple(part.shape) == shape:
                whole = part
                continue
            if whole is None:
                whole = torch.empty(shape, dtype=data.dtype)
            whole[
                tuple(slice(a - s, b - s) for a, b, s in zip(first[lead:], last[lead:], start[lead:], strict=True))
            ] = part
        if whole is None or covered != prod(shape):
            raise UserError(
                f"{self.folder}: tensor {slice_.key}{list(slice_.index)} is not whole: its chunks hold {covered} of "
                f"{prod(shape)} numbers; the checkpoint is damaged"
            )
        return whole

    def _overlapping(
        self, key: str, entry: TensorStorageMetadata, index: tuple[int, ...]
    ) -> Sequence[ChunkStorageMetadata]:
        """Return the chunks that can overlap tensor[index], few of the very many that a model has."""
        if (key, len(index)) not in self._by_index:
            chunks_at: dict[tuple[int, ...] | None, list[ChunkStorageMetadata]] = {}
            for chunk in entry.chunks:
                lead = tuple(chunk.sizes[: len(index)])
                chunks_at.setdefault(tuple(chunk.offsets[: len(index)]) if set(lead) <= {1} else None, []).append(chunk)
            self._by_index[key, len(index)] = chunks_at
        chunks_at = self._by_index[key, len(index)]
        return (*chunks_at.get(index, ()), *chunks_at.get(None, ()))

    def _chunk(self, key: str, entry: TensorStorageMetadata, chunk: ChunkStorageMetadata) -> Tensor:
        storage = self._stored.get((key, tuple(chunk.offsets)))
        wanted = prod(chunk.sizes) * entry.properties.dtype.itemsize
        if storage is None or storage.length < wanted:
            raise UserError(f"{self.folder}: tensor {key} lacks its chunk at {list(chunk.offsets)}; copy it again")
        path = self.folder / storage.relative_path
        try:
            with ordinary(path).open("rb") as file:
                part = _FilePart(file, storage.offset, storage.length)
                # torch asks a file for what `io.RawIOBase` has, and is typed for `typing.IO`, which no raw file is
                data = torch.load(part, weights_only=True)  # type: ignore[arg-type]
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError) as error:
            text = str(error).splitlines()[0]
            raise UserError(f"{path}: tensor {key} is damaged or not safe to load: {text}") from None
        right = isinstance(data, Tensor) and tuple(data.shape) == tuple(chunk.sizes)
        if not right or data.dtype != entry.properties.dtype:
            raise UserError(f"{path}: tensor {key} is not what the index says of its chunk at {list(chunk.offsets)}")
        return data


class _FilePart(io.RawIOBase):
    """A part of an open file as a file of its own: torch reads it straight into a tensor's memory."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._start + self._at)
        size = max(0, min(len(buffer), self._length - self._at))
        count = self._file.readinto(memoryview(buffer).cast("B")[:size])
        self._at += count
        return count


@dataclass(frozen=True, slots=True)
class PlannedChunk:
    """A parameter that will be written. shape: without the leading axes of `slice_`."""

    slice_: StoredSlice
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def offsets(self) -> tuple[int, ...]:
        """Return where the chunk begins in its global tensor."""
        return *self.slice_.index, *(0,) * len(self.shape)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of the parameter."""
        return prod(self.shape) * self.dtype.itemsize

    def item(self) -> WriteItem:
        """Return the chunk as torch's writer plans it."""
        offsets = torch.Size(self.offsets)
        sizes = torch.Size((*(1 for _ in self.slice_.index), *self.shape))
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=self.dtype),
            size=torch.Size((*self.slice_.lead, *self.shape)),
        )
        return WriteItem(MetadataIndex(self.slice_.key, offsets), WriteItemType.SHARD, tensor_data=data)


class _LazyPlanner(SavePlanner):
    """Plans for torch's writer what will be written; `make(slice_)` gives each tensor when the writer asks for it.

    empty: keys of objects that hold nothing.
    """

    def __init__(
        self, chunks: Sequence[PlannedChunk], make: Callable[[StoredSlice], Tensor], empty: Sequence[str]
    ) -> None:
        self._empty = empty
        self._chunks = {(chunk.slice_.key, chunk.offsets): chunk for chunk in chunks}
        self._make = make

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._empty]
        return SavePlan([*(chunk.item() for chunk in self._chunks.values()), *objects])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans, rewrite_index_hints=False)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            nothing = io.BytesIO()
            torch.save([None], nothing)  # Megatron-Core's form: a list of what the ranks' shards hold
            return nothing
        offset = write_item.index.offset
        assert offset is not None, "every item that is no object is a chunk's"
        chunk = self._chunks[write_item.index.fqn, tuple(offset)]
        tensor = self._make(chunk.slice_)
        assert tuple(tensor.shape) == chunk.shape and tensor.dtype == chunk.dtype, chunk
        return tensor.reshape((*(1 for _ in chunk.slice_.index), *chunk.shape)).contiguous()


def write_tensors(
    folder: Path,
    chunks: Sequence[PlannedChunk],
    make: Callable[[StoredSlice], Tensor],
    empty: Sequence[str],
    world_size: int,
) -> None:
    """Write this rank's share of the chunks, and on rank 0 the index of all. Collective where there are ranks.

    empty: keys of objects that hold nothing, written by this rank. Raises what `make` raised, or the OSError of the
    disk, on every rank if any failed.
    """
    crc = torch.serialization.get_crc32_options()
    # torch.load does not look at the sum, and making it halves the speed
    torch.serialization.set_crc32_options(False)
    try:
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, thread_count=1)
        dcp.save({}, storage_writer=writer, planner=_LazyPlanner(chunks, make, empty), no_dist=world_size == 1)
    except CheckpointException as error:
        raise _cause(error) from None
    finally:
        torch.serialization.set_crc32_options(crc)


def write_frame(folder: Path) -> None:
    """Write the two small files by which Megatron-Core recognises the folder."""
    torch.save(COMMON, folder / COMMON_NAME)
    (folder / BACKEND_NAME).write_text(json.dumps(BACKEND), encoding="utf-8")


def _cause(error: CheckpointException) -> BaseException:
    failures: Mapping[int, tuple[BaseException, object]] = error.failures
    return next((cause for cause, _ in failures.values() if not isinstance(cause, Exception)), None) or next(
        cause for cause, _ in failures.values()
    )
