"""May a folder be a store of reference scores, and what does one hold?

A folder that is not there yet, an empty one, or one that this program made a store of; anything else is the user's.

Left out: scores themselves (`store.py`). Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.reference_store.index import VALUES_SUFFIX, index_files, read_entries
from megatron_powerflow.whole_files import is_partial_of, ordinary, write_file

STORE_NAME = "store.json"
MARK = {"holds": "reference scores of megatron_powerflow", "format": 1}
MAX_JSON_BYTES = 2**20
SHOWN = 3
KEY = "model.reference_store"


@dataclass(frozen=True, slots=True)
class BaseCount:
    """What a store holds of one base. base: 64 hexadecimal digits; about: what is known of it, {} for nothing."""

    base: str
    about: Mapping[str, Any]
    num_passes: int
    num_responses: int
    num_tokens: int


def is_store(folder: Path) -> bool:
    """Whether the folder says that it is a store, of whatever format."""
    mark = _read_json(folder / STORE_NAME)
    return isinstance(mark, dict) and mark.get("holds") == MARK["holds"]


def store_violations(folder: Path, run_folder: Path) -> list[str]:
    """Return why a run cannot keep its reference scores there, a sentence each; [] where it can. Changes nothing.

    run_folder: run.output_dir.
    """
    here, run = Path(os.path.realpath(folder)), Path(os.path.realpath(run_folder))
    if here == run or here in run.parents or run in here.parents:
        return [f"{KEY}={str(folder)!r} and run.output_dir={str(run_folder)!r} lie in one another; name a folder apart"]
    if not folder.exists():
        above = next(path for path in folder.absolute().parents if path.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            return [f"{KEY}={str(folder)!r}: {above} is no folder that can be written; name another folder"]
        return []
    if not folder.is_dir():
        return [f"{KEY}={str(folder)!r} is a file; name a folder"]
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        return [f"{KEY}={str(folder)!r} cannot be read and written; mend its permissions or name another folder"]
    if is_store(folder):
        its_format = _read_json(folder / STORE_NAME).get("format")
        if its_format == MARK["format"]:
            return []
        return [f"{KEY}={str(folder)!r} is of format {its_format!r}; this program reads format 1; name another folder"]
    if others := sorted(path.name for path in folder.iterdir() if not is_partial_of(path.name, (STORE_NAME,))):
        return [
            f"{KEY}={str(folder)!r} holds other files and no store ({', '.join(others[:SHOWN])}); name a new folder"
        ]
    return []


def prepare_store(folder: Path, run_folder: Path) -> None:
    """Make the folder a store, where it is none yet. Raises UserError, or OSError that names what failed."""
    if violations := store_violations(folder, run_folder):
        raise UserError(violations)
    if not is_store(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / STORE_NAME, json.dumps(MARK) + "\n")


def base_digest(about: Mapping[str, Any]) -> bytes:
    """Return the SHA-256 of what makes a base: what is equal as JSON, with the keys sorted, is one base."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).digest()


def describe_base(folder: Path, base: bytes, about: Mapping[str, Any]) -> None:
    """Write what a base is beside its scores, where it is not written yet. Raises OSError."""
    path = _base_file(folder, base.hex())
    if not path.exists():
        write_file(path, json.dumps(about, indent=2) + "\n")


def count_store(folder: Path) -> tuple[list[BaseCount], list[str]]:
    """Return what a store holds of each base, and what is damaged in it, a sentence each. Reads no score.

    Passes that two runs have scored at one time count once.
    """
    seen: dict[bytes, dict[bytes, tuple[int, int]]] = {}
    notes = []
    for path in index_files(folder):
        damaged = 0
        try:
            for entry in read_entries(path):
                if entry is None:
                    damaged += 1
                    continue
                seen.setdefault(entry.base, {})[entry.of_pass] = (entry.num_responses, entry.num_values)
        except OSError as error:
            notes.append(f"{path}: cannot be read ({error.strerror})")
        if damaged:
            notes.append(f"{path}: {damaged} damaged entries are left out, and no other")
        if not path.with_suffix(VALUES_SUFFIX).is_file():
            notes.append(f"{path}: its {VALUES_SUFFIX} file is gone, and with it its scores")
    counts = []
    for base, passes in sorted(seen.items()):
        about = _read_json(_base_file(folder, base.hex()))
        responses, tokens = (sum(numbers) for numbers in zip(*passes.values(), strict=True))
        counts.append(BaseCount(base.hex(), about if isinstance(about, dict) else {}, len(passes), responses, tokens))
    return counts, notes


def _base_file(folder: Path, base: str) -> Path:
    return folder / f"base_{base[:16]}.json"


def _read_json(path: Path) -> Any:
    """Return what a small JSON file says; None where it cannot be read."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            return None
        return json.loads(ordinary(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
