"""What did a command name, and where on this disk is it?

Left out: how it comes here (`fetch.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.names import Kind


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user named. label: how messages call the place where it was named: --model, model.hf_path."""

    kind: Kind
    text: str
    label: str

    def __str__(self) -> str:
        return f"{self.label}={self.text!r}" if "." in self.label else f"{self.label} {self.text}"

    @property
    def instead(self) -> str:
        """What can be given without a hub."""
        return "give a local Hugging Face folder" if self.kind == "model" else "give a local file"


@dataclass(frozen=True, slots=True)
class Fetched:
    """One name of the hub, on this disk.

    id: OWNER/NAME of a model, datasets/OWNER/NAME of a data set. revision: the commit, 40 hexadecimal digits. files:
    what was asked for, relative to `folder`, all there. missing: weights that were left on the hub.
    """

    id: str
    revision: str
    folder: str
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Located:
    """Where on this disk a command's names are. A text that is not among `fetched` is a path."""

    fetched: Mapping[tuple[Kind, str], Fetched] = field(default_factory=dict)

    def model(self, text: str | Path) -> Fetched | None:
        """None: a path."""
        return self.fetched.get(("model", str(text)))

    def folder(self, text: str | Path) -> Path:
        """Of a model."""
        found = self.model(text)
        return Path(found.folder) if found else Path(text)

    def files(self, text: str | Path) -> tuple[Path, ...]:
        """Of data: a file, or those of a data set."""
        found = self.fetched.get(("dataset", str(text)))
        return tuple(Path(found.folder, file) for file in found.files) if found else (Path(text),)

    def file(self, text: str | Path) -> Path:
        """Of data that must be one file. Raises UserError."""
        first, *others = self.files(text)
        if others:
            raise UserError(f"{text}: {1 + len(others)} files on the hub, and one is read; name it with hf://")
        return first

    @property
    def revisions(self) -> dict[str, str]:
        """Name on the hub -> commit."""
        return {found.id: found.revision for found in self.fetched.values()}


AS_NAMED = Located()
