"""Which reference scores are known? Those that this run or another has put into the folder, also while this one runs.

    FOLDER/store.json        says that the folder is a store
    FOLDER/base_<hex>.json   what a base is, for people: weights, sizes, temperature, number format
    FOLDER/<hex>.index       the passes that one process of one start has scored (`index.py`)
    FOLDER/<hex>.values      their log-probs

Each process appends to files of its own, values before entries, so that nobody waits for anybody and a kill costs what
was being written. Nothing is ever changed or removed, and nothing in the folder is executed.

Left out: what a pass is called (`training/known_scores.py`); what a folder may be (`folder.py`). Imports no torch.
"""

from __future__ import annotations

import os
import uuid
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_powerflow.reference_store.index import (
    ENTRY_BYTES,
    INDEX_SUFFIX,
    VALUE,
    VALUES_SUFFIX,
    Entry,
    append,
    index_files,
    read_entries,
    read_values,
    storable,
)
from megatron_powerflow.whole_files import sync


@dataclass(frozen=True, slots=True)
class ScoredPass:
    """What one forward pass of the reference found. of_pass: SHA-256 of what the numbers depend on beside the base;
    log_probs: [n] fp32, of all response tokens, row by row; num_responses: rows."""

    of_pass: bytes
    log_probs: np.ndarray
    num_responses: int


class ReferenceStore:
    """The store as one process sees it: entries of one base, and files of its own to append to.

    folder: which is a store (`folder.prepare_store`). base: 32 bytes; entries of other bases are passed over. An entry
    that is held costs some 300 bytes; values stay on the disk.
    """

    def __init__(self, folder: Path, base: bytes) -> None:
        self._folder, self._base = folder, base
        self._entries: dict[bytes, tuple[str, Entry]] = {}
        self._num_read: dict[str, int] = {}  # entries read so far, by the name of the file
        self._damaged: dict[str, int] = {}
        self._own: str | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read what has been appended to the indexes since the last look. A damaged entry is named in a warning."""
        for path in index_files(self._folder):
            name = path.name.removesuffix(INDEX_SUFFIX)
            first = self._num_read.get(name, 0)
            try:
                if path.stat().st_size // ENTRY_BYTES <= first:
                    continue
                for entry in read_entries(path, first):
                    self._num_read[name] = self._num_read.get(name, 0) + 1
                    if entry is None:
                        self._damaged[name] = self._damaged.get(name, 0) + 1
                    elif entry.base == self._base:
                        self._entries.setdefault(entry.of_pass, (name, entry))
            except OSError as error:
                self._num_read[name] = 2**62  # it is not looked at again
                _warn(f"{path}: cannot be read ({error.strerror}); its scores are made anew")
            if (number := self._damaged.pop(name, 0)) > 0:
                _warn(f"{path}: {number} damaged entries are left out, and no other; their scores are made anew")

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, of_pass: bytes, num_values: int) -> np.ndarray | None:
        """Return the log-probs of a pass, [num_values] fp32; None where they are not known.

        Values that are not what was written are named in a warning, and are not known.
        """
        name, entry = self._entries.get(of_pass, ("", None))
        if entry is None:
            return None
        path = self._folder / (name + VALUES_SUFFIX)
        try:
            values = read_values(path, entry) if entry.num_values == num_values else None
        except OSError as error:
            why = error.strerror or "no such file"
        else:
            if values is not None:
                return values
            why = "damaged, or not all there"
        del self._entries[of_pass]
        _warn(f"{path}: the scores at byte {entry.offset} are left out ({why}), and made anew")
        return None

    def add(self, passes: Sequence[ScoredPass]) -> None:
        """Append passes; they are on the disk when the function returns. Raises OSError that names the file.

        Those with a number that is no log-prob are left out: a base that gives such is refused by who asks for it.
        """
        kept = [one for one in passes if one.of_pass not in self._entries and storable(one.log_probs)]
        if not kept:
            return
        name = self._own = self._own or self._begin()
        values, entries = [], []
        offset = (self._folder / (name + VALUES_SUFFIX)).stat().st_size
        for one in kept:
            content = one.log_probs.astype(VALUE).tobytes()
            entries.append(
                Entry(self._base, one.of_pass, offset, len(one.log_probs), one.num_responses, zlib.crc32(content))
            )
            values.append(content)
            offset += len(content)
        append(self._folder / (name + VALUES_SUFFIX), b"".join(values))
        append(self._folder / (name + INDEX_SUFFIX), b"".join(entry.to_bytes() for entry in entries))
        self._num_read[name] = self._num_read.get(name, 0) + len(entries)
        self._entries |= {entry.of_pass: (name, entry) for entry in entries}

    def _begin(self) -> str:
        """Make this process's two files, empty, and return their name."""
        name = uuid.uuid4().hex
        for suffix in (VALUES_SUFFIX, INDEX_SUFFIX):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(self._folder / (name + suffix), flags, 0o666))
        sync(self._folder)
        return name


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)
