"""How is a Hugging Face folder written tensor by tensor, without holding a file of it in memory?

The header of a safetensors file needs names, shapes and dtypes only, which are all known beforehand. So the files are
planned first; each starts with its whole header, and a tensor's bytes are written at their offset when it comes.

The format is: 8 bytes with the header's length, little-endian; the header, in JSON; the tensors' bytes without gaps.

Left out: where the tensors come from (`converter/convert.py`, `live_weights.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_powerflow.hf.files import FLOATS, INDEX_NAME, SINGLE_NAME

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WRITE_BYTES = 2**20  # of one call: 1.5 times as fast as one call for a whole tensor of 100 MB


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype that safetensors calls `name`: "F32", "BF16" or "F16"."""
    import torch

    return getattr(torch, FLOATS[name].torch_name)


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a dtype that weights come in: "F32", "BF16" or "F16"."""
    return next(name for name in FLOATS if torch_dtype(name) is dtype)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in a file's header. dtype: safetensors' name for it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes of the tensor's numbers."""
        return FLOATS[self.dtype].num_bytes * prod(self.shape)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file of the folder to be written. groups: the numbers, from 0, of the groups of tensors in it; tensors: name ->
    header entry of all tensors of these groups."""

    name: str
    groups: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def num_bytes(self) -> int:
        """The bytes of all tensors in the file, without the header."""
        return sum(info.num_bytes for info in self.tensors.values())


def plan_files(
    groups: Sequence[Mapping[str, TensorInfo]], max_bytes: int, *, prefix: str = "part"
) -> list[PlannedFile]:
    """Distribute groups of tensors over files of at most max_bytes each, in order. No groups give no files.

    groups: the tensors of a group come together, and stay together in a file; a group that alone is larger than
    max_bytes gets a file of its own. prefix: keeps the files of several writers in one folder apart until `write_index`
    gives them the names that HF expects.
    """
    parts: list[list[int]] = [[]]
    filled = 0
    for number, group in enumerate(groups):
        size = sum(info.num_bytes for info in group.values())
        if parts[-1] and filled + size > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(number)
        filled += size
    return [
        PlannedFile(
            f"{prefix}-{part_number:05d}.safetensors",
            tuple(part),
            {name: info for number in part for name, info in groups[number].items()},
        )
        for part_number, part in enumerate(parts)
        if part
    ]


def write_index(folder: Path, file_of: Mapping[str, str], total_bytes: int) -> None:
    """Give the files of a folder their final names, in the order of `file_of`, and write the index.

    A single file is named model.safetensors and gets no index. file_of: tensor -> name of its file; those of several
    writers stand behind each other. total_bytes: the size of all tensors together.
    """
    files = list(dict.fromkeys(file_of.values()))
    final = {name: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, name in enumerate(files)}
    if len(files) == 1:
        final = {files[0]: SINGLE_NAME}
    for planned_name, final_name in final.items():
        (folder / planned_name).rename(folder / final_name)
    if len(files) > 1:
        weight_map = {tensor: final[name] for tensor, name in sorted(file_of.items())}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class ShardFile:
    """A safetensors file that is being written. Each of its tensors is added once, in any order.

    The file is on the disk as soon as `close` returns.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        header: dict = {"__metadata__": {"format": "pt"}}
        self._missing = dict(tensors)
        self._offset_of: dict[str, int] = {}
        end = 0
        # wide types first: every tensor then starts at a multiple of its own size
        for name in sorted(tensors, key=lambda name: -FLOATS[tensors[name].dtype].num_bytes):
            info, start = tensors[name], end
            end += info.num_bytes
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [start, end]}
            self._offset_of[name] = start
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must be on the CPU and have the planned shape and dtype."""
        import torch

        info = self._missing.pop(name)
        assert tuple(tensor.shape) == info.shape and tensor.dtype == torch_dtype(info.dtype), name
        self._file.seek(self._data + self._offset_of[name])
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        for first in range(0, len(data), WRITE_BYTES):
            self._file.write(data[first : first + WRITE_BYTES])

    def close(self) -> None:
        """Flush the file to the disk, once every tensor has been added."""
        assert not self._missing, f"never written: {sorted(self._missing)[:5]}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file, unfinished as it is, after a failure."""
        self._file.close()


class ShardWriter:
    """Writes planned files as their tensors come, in the order of the plan, with one file open at a time.

    No tensor is held after `add` returns; behind the last tensor every file is on the disk.
    """

    def __init__(self, folder: Path, files: Sequence[PlannedFile]) -> None:
        self._folder = folder
        self._files = {name: file for file in files for name in file.tensors}
        self._missing: set[str] = set()
        self._open: ShardFile | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, on any device, which must have the planned shape and dtype."""
        file = self._files.pop(name)
        if self._open is None:
            self._open, self._missing = ShardFile(self._folder / file.name, file.tensors), set(file.tensors)
        self._open.add(name, tensor.detach().cpu())
        self._missing.remove(name)
        if not self._missing:
            self._open.close()
            self._open = None

    def close(self) -> None:
        """Check that every planned tensor has been written."""
        assert not self._files, f"never written: {sorted(self._files)[:5]}"

    def abandon(self) -> None:
        """Close the open file, unfinished as it is, after a failure."""
        if self._open is not None:
            self._open.abandon()
