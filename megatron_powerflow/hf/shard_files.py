"""How is a Hugging Face folder written tensor by tensor, without holding a file of it in memory?

The header of a safetensors file needs names, shapes and dtypes only, all known beforehand. So the files are planned
first; each starts with its whole header, and a tensor's bytes go to their place when it comes.

The format: 8 bytes with the header's length, little-endian; the header, JSON; the tensors' bytes without gaps.

Left out: where the tensors come from (`converter/convert.py`).
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
    from torch import Tensor

WRITE_BYTES = 2**20  # in one call: half as much again as a call for a whole tensor of 100 MB writes in the same time


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor. dtype: safetensors' name for it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return FLOATS[self.dtype][1] * prod(self.shape)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file of the folder. groups: numbers of the groups of tensors in it; tensors: all of theirs."""

    name: str
    groups: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())


def plan_files(groups: Sequence[Mapping[str, TensorInfo]], max_bytes: int) -> list[PlannedFile]:
    """Deal groups of tensors that come together to files of at most max_bytes each, in order, named as HF names them.

    A group that alone is larger has a file to itself.
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
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = [SINGLE_NAME]
    return [
        PlannedFile(name, tuple(part), {key: info for number in part for key, info in groups[number].items()})
        for name, part in zip(names, parts, strict=True)
    ]


def write_planned_index(folder: Path, files: Sequence[PlannedFile]) -> None:
    """model.safetensors.index.json; none for a single file."""
    if len(files) == 1:
        return
    weight_map = {name: file.name for file in files for name in file.tensors}
    total = sum(file.num_bytes for file in files)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class ShardFile:
    """A safetensors file being written. Each of its tensors is added once, in any order; `close` has it on the disk."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        header: dict = {"__metadata__": {"format": "pt"}}
        self._missing = dict(tensors)
        self._offset_of: dict[str, int] = {}
        end = 0
        # wide types first: every tensor then starts at a multiple of its own size
        for name in sorted(tensors, key=lambda name: -FLOATS[tensors[name].dtype][1]):
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
        """Write one tensor, on CPU, of the planned shape and dtype."""
        import torch

        info = self._missing.pop(name)
        assert tuple(tensor.shape) == info.shape and tensor.dtype == getattr(torch, FLOATS[info.dtype][0]), name
        self._file.seek(self._data + self._offset_of[name])
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        for first in range(0, len(data), WRITE_BYTES):
            self._file.write(data[first : first + WRITE_BYTES])

    def close(self) -> None:
        assert not self._missing, f"never written: {sorted(self._missing)[:5]}"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """After a failure: let go of the file, unfinished as it is."""
        self._file.close()
