"""Is everything that is read of a model's folder, or copied out of it, an ordinary file of this folder?

A link to /etc/shadow under the name of a tokenizer would be copied into every checkpoint and export, and pushed to the
hub; a FIFO would hold the run for ever. The hub's own cache is made of links, from snapshots/COMMIT to blobs beside it:
those are followed.

Left out: what the files hold.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.files import COMPANION_PATTERNS

COPIED = ("config.json", *COMPANION_PATTERNS)
SHOWN = 5
KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def require_ordinary_files(folder: Path) -> None:
    """Raise UserError with every entry of a model's folder that is no ordinary file, or is copied and links out of it.

    Links of weights may lead anywhere, as these are read as numbers and never copied as they are. A folder that does
    not exist is for its reader to name.
    """
    if not folder.is_dir():
        return
    if violations := list(_special(folder)):
        more = [f"... and {len(violations) - SHOWN} more like these"] if len(violations) > SHOWN else []
        raise UserError([*violations[:SHOWN], *more])
    refuse_links_outside(folder, sorted({path for pattern in COPIED for path in folder.glob(pattern)}))


def refuse_links_outside(folder: Path, paths: Sequence[Path]) -> None:
    """Refuse links that leave the folder. Raises UserError naming each.

    Allowed are links into the blobs of Hugging Face's own cache: the repository's, and since huggingface_hub 2 those
    of all repositories.
    """
    real = folder.resolve()
    allowed = [real]
    for parent in (real, *real.parents):
        if parent.parent.name == "snapshots":
            allowed += [parent.parent.parent / "blobs", parent.parent.parent.parent / "blobs"]
    outside = [
        path
        for path in paths
        if _is_link(path, folder) and not any(map(Path(os.path.realpath(path)).is_relative_to, allowed))
    ]
    if outside:
        raise UserError([f"{path}: a link that leads out of the folder; put the file itself there" for path in outside])


def _special(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        try:
            kind = KINDS.get(stat.S_IFMT(path.stat().st_mode))
        except OSError:  # a link to nothing: its reader will say what is wrong
            continue
        if kind is not None:
            yield f"{path}: is {kind}, and no ordinary file; take it out of the model's folder"


def _is_link(path: Path, folder: Path) -> bool:
    """Whether the path, or a folder between it and `folder`, is a link."""
    return any(part.is_symlink() for part in (path, *path.parents) if part != folder and part.is_relative_to(folder))
