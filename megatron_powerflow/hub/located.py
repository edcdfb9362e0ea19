"""Which names did a user give, and where on this disk are the files behind them?

A `RequestedName` is what the user wrote, a `Download` is what the hub has under that name, and `LocalPaths` answers for
every name of a command where its files are.

Left out: how the files come to this disk (`fetch.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.names import Kind


@dataclass(frozen=True, slots=True)
class RequestedName:
    """Holds the name of a model or a data set as the user gave it.

    label: the option or config key that holds the name, for messages: --model, model.hf_path.
    """

    kind: Kind
    text: str
    label: str

    def __str__(self) -> str:
        return f"{self.label}={self.text!r}" if "." in self.label else f"{self.label} {self.text}"

    @property
    def instead(self) -> str:
        """Returns the advice of a message: what the user can give that needs no hub."""
        return "give a local Hugging Face folder" if self.kind == "model" else "give a local file"


@dataclass(frozen=True, slots=True)
class Download:
    """Lists the files of one name on the hub, as they lie on this disk.

    id: OWNER/NAME of a model, datasets/OWNER/NAME of a data set. revision: the commit, 40 hexadecimal digits. files:
    the files that were asked for, relative to `folder`, all present. missing: weights that were left on the hub.
    """

    id: str
    revision: str
    folder: str
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class LocalPaths:
    """Answers where on this disk the files of a command's names are. A text that is not in `downloads` is a path."""

    downloads: Mapping[tuple[Kind, str], Download] = field(default_factory=dict)

    def model(self, text: str | Path) -> Download | None:
        """Returns the download of a model; None where the text is a path."""
        return self.downloads.get(("model", str(text)))

    def folder(self, text: str | Path) -> Path:
        """Returns the folder of a model, downloaded or local."""
        download = self.model(text)
        return Path(download.folder) if download else Path(text)

    def files(self, text: str | Path) -> tuple[Path, ...]:
        """Returns the data files behind a name: a local file is one, a data set of the hub may be several."""
        download = self.downloads.get(("dataset", str(text)))
        return tuple(Path(download.folder, file) for file in download.files) if download else (Path(text),)

    def file(self, text: str | Path) -> Path:
        """Returns the one data file behind a name. Raises UserError where the data set has several."""
        first, *others = self.files(text)
        if others:
            raise UserError(f"{text}: {1 + len(others)} files on the hub, and one is read; name it with hf://")
        return first

    @property
    def revisions(self) -> dict[str, str]:
        """Returns {name on the hub: commit} of everything that was downloaded."""
        return {download.id: download.revision for download in self.downloads.values()}


NO_DOWNLOADS = LocalPaths()  # every name of the command is a path on this disk
