"""Which passes does a file of the store hold, and where? Entries of one size, so that a damaged one costs itself alone.

    NAME.index    an entry behind the other, 88 bytes each, little-endian:
                  base [32]  pass [32]  offset u64  num_values u32  num_responses u32  crc32 of the values  crc32 of
                  the entry before it
    NAME.values   fp32, little-endian: of each entry num_values of them from byte `offset` on

A torn end is no entry. What is damaged is found where the next entry begins, 88 bytes on.

Left out: whose the files are and who writes them (`store.py`). Imports no torch.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_powerflow.whole_files import ordinary

INDEX_SUFFIX, VALUES_SUFFIX = ".index", ".values"
NAME = re.compile(r"[0-9a-f]{32}")
ENTRY = struct.Struct("<32s32sQIII")
ENTRY_BYTES = ENTRY.size + 4
ENTRIES_AT_A_TIME = 2**14  # 1.4 MB
MAX_INDEX_BYTES = 2**30  # 12 million passes of one start of one process; a larger file is nothing of ours
VALUE = np.dtype("<f4")
MAX_LOG_PROB = 1e-4  # a sum of probabilities may round to a little over 1


def index_files(folder: Path) -> list[Path]:
    """Return the indexes of a store, by name; another file of that ending is not the store's."""
    return sorted(path for path in folder.glob(f"*{INDEX_SUFFIX}") if NAME.fullmatch(path.stem))


@dataclass(frozen=True, slots=True)
class Entry:
    """One forward pass that is known. base, of_pass: SHA-256; offset: of its first byte among the values; num_values:
    log-probs, one a response token; checksum: CRC-32 of their bytes."""

    base: bytes
    of_pass: bytes
    offset: int
    num_values: int
    num_responses: int
    checksum: int

    def to_bytes(self) -> bytes:
        """Return the entry as it stands in the file."""
        content = ENTRY.pack(self.base, self.of_pass, self.offset, self.num_values, self.num_responses, self.checksum)
        return content + zlib.crc32(content).to_bytes(4, "little")


def entry_of(content: bytes) -> Entry | None:
    """Return the entry that ENTRY_BYTES bytes of a file are; None where they are damaged."""
    if zlib.crc32(content[: ENTRY.size]) != int.from_bytes(content[ENTRY.size :], "little"):
        return None
    return Entry(*ENTRY.unpack(content[: ENTRY.size]))


def read_entries(path: Path, first: int = 0) -> Iterator[Entry | None]:
    """Yield the whole entries of an index from number `first` on; None for each that is damaged. Raises OSError."""
    if ordinary(path).stat().st_size > MAX_INDEX_BYTES:
        raise OSError(errno.EFBIG, f"more than {MAX_INDEX_BYTES:,} bytes", str(path))
    with ordinary(path).open("rb") as file:
        file.seek(first * ENTRY_BYTES)
        while block := file.read(ENTRIES_AT_A_TIME * ENTRY_BYTES):
            for start in range(0, len(block) - ENTRY_BYTES + 1, ENTRY_BYTES):
                yield entry_of(block[start : start + ENTRY_BYTES])


def read_values(path: Path, entry: Entry) -> np.ndarray | None:
    """Return an entry's log-probs, [num_values] fp32; None where they are not there, or not what was written.

    Raises OSError.
    """
    num_bytes = entry.num_values * VALUE.itemsize
    if ordinary(path).stat().st_size < entry.offset + num_bytes:
        return None
    with path.open("rb") as file:
        file.seek(entry.offset)
        content = file.read(num_bytes)
    if len(content) != num_bytes or zlib.crc32(content) != entry.checksum:
        return None
    values = np.frombuffer(content, VALUE).astype(np.float32)
    return values if storable(values) else None


def storable(values: np.ndarray) -> bool:
    """Whether these can be log-probs: finite, and of probabilities up to 1."""
    return bool(np.isfinite(values).all() and (values <= MAX_LOG_PROB).all())


def append(path: Path, content: bytes) -> None:
    """Append to a file of this process's own, which is on the disk when the function returns. Raises OSError that names
    the path; the file has its old length then, as far as the disk lets it be cut."""
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        size = os.fstat(descriptor).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)
