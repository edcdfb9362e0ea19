"""What do trainer and server have to agree on, to the byte? Checksums of tensors, and files of changed bytes.

Both sides read this file: the trainer as a part of the package, the server by its own name beside
`powerflow_on_server.py`. It imports numpy and torch, and nothing of `megatron_powerflow`.

A file of changes is a safetensors file. A tensor's numbers are taken as columns of bytes: of an fp32 number byte 0
changes at nearly every step, byte 3 hardly ever. Of each column that changed it has one of three forms, the smallest:

    NAME|COLUMN|positions   U32: which numbers changed        NAME|COLUMN|values   U8: what their byte is now
    NAME|COLUMN|mask        a bit per number                  NAME|COLUMN|values
    NAME|COLUMN|all         nothing                           NAME|COLUMN|values   the whole column
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
CHECKSUM_PRIME = 65521
CHECKSUM_ELEMENTS = 2**22  # at a time: bounds the memory of a checksum
POSITION_BYTES = 4


def checksum(tensor: Tensor) -> str:
    """Return a checksum of a tensor's numbers, dtype and shape, the same wherever it is computed.

    tensor: of a 16- or 32-bit type. It is two sums over the 16-bit words, modulo 2^64, one of them weighted by the
    place modulo 65,521, so that rows or columns that changed places show. For mistakes, not against malice.
    """
    words = tensor.detach().contiguous().reshape(-1).view(torch.int16)
    plain = weighted = 0
    for first in range(0, words.numel(), CHECKSUM_ELEMENTS):
        part = words[first : first + CHECKSUM_ELEMENTS].to(torch.int64)
        place = torch.arange(first, first + part.numel(), device=part.device) % CHECKSUM_PRIME + 1
        plain += int(part.sum())
        weighted += int((part * place).sum())
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')}:{shape}:{plain % 2**64:016x}{weighted % 2**64:016x}"


@dataclass(frozen=True)
class Entry:
    """A tensor's place in a safetensors file. first: byte of its first number in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    num_bytes: int


def entries(folder: Path) -> dict[str, Entry]:
    """Read the headers of a folder's safetensors files: name -> entry. Raises OSError, ValueError, KeyError."""
    found: dict[str, Entry] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"], torch.uint8)
            found[name] = Entry(path, dtype, tuple(entry["shape"]), 8 + length + begin, end - begin)
    return found


def bytes_of(entry: Entry) -> np.ndarray:
    """Read a tensor's bytes: [num_bytes] uint8."""
    return np.fromfile(entry.file, np.uint8, entry.num_bytes, offset=entry.first)


def read(entry: Entry) -> Tensor:
    """Read one tensor."""
    if not entry.num_bytes:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.from_numpy(bytes_of(entry)).view(entry.dtype).reshape(entry.shape)


def columns(tensor: Tensor) -> np.ndarray:
    """Return a tensor's numbers as bytes: [numel, bytes of a number] uint8, without a copy where it is contiguous."""
    width = tensor.element_size()
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().reshape(-1, width)


def changes_of(name: str, before: np.ndarray, now: np.ndarray) -> dict[str, np.ndarray]:
    """Return what of a tensor's bytes changed, by the keys of a file of changes; {} for nothing.

    before, now: [n, w] uint8, as `columns` gives.
    """
    found: dict[str, np.ndarray] = {}
    for column in range(now.shape[1]):
        differs = before[:, column] != now[:, column]
        count, total = int(differs.sum()), len(differs)
        if not count:
            continue
        key = f"{name}|{column}"
        sizes = {"positions": POSITION_BYTES * count + count, "mask": -(-total // 8) + count, "all": total}
        form = min(sizes, key=lambda form: sizes[form])
        if form == "positions":
            found[f"{key}|positions"] = np.flatnonzero(differs).astype(np.uint32).view(np.uint8)
        elif form == "mask":
            found[f"{key}|mask"] = np.packbits(differs)
        else:
            found[f"{key}|all"] = np.empty(0, np.uint8)
        found[f"{key}|values"] = now[:, column].copy() if form == "all" else now[differs, column]
    return found


def apply_changes(folder: Path, changes: Path) -> None:
    """Change a folder's tensors in place. Raises KeyError, ValueError, IndexError where they do not belong together."""
    held, given = entries(folder), entries(changes)
    for key in sorted(given):
        name, column, form = key.rsplit("|", 2)
        if form == "values":
            continue
        entry = held[name]
        width = torch.empty((), dtype=entry.dtype).element_size()
        where, values = bytes_of(given[key]), bytes_of(given[f"{name}|{column}|values"])
        whole = np.memmap(entry.file, np.uint8, "r+", offset=entry.first, shape=(entry.num_bytes,))
        numbers = whole.reshape(-1, width)[:, int(column)]
        if form == "positions":
            numbers[where.view(np.uint32)] = values
        elif form == "mask":
            numbers[np.unpackbits(where, count=len(numbers)).astype(bool)] = values
        else:
            numbers[:] = values
        whole.flush()
