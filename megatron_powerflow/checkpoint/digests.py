"""Are the files of a checkpoint those that were written? SHA-256 of each, in the format of `sha256sum -c`.

Every rank reads its share of the files, so that a large checkpoint is read once and by everybody. Nothing here
communicates; `whole.py` brings the shares together.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import ordinary

SUMS_NAME = "SHA256SUMS"


def write_sums(folder: Path, digests: dict[str, str]) -> None:
    """Write the digests into the folder, as SHA256SUMS.

    digests: relative path -> SHA-256, of all files. Raises OSError.
    """
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    (folder / SUMS_NAME).write_text("".join(lines), encoding="utf-8")


def check_share(folder: Path, rank: int, world_size: int) -> None:
    """Compare this rank's share of the files in `folder` with SHA256SUMS.

    Raises UserError with every file of the share that is missing, damaged or not in SHA256SUMS.
    """
    if bad := damage_of_share(folder, rank, world_size):
        raise UserError(f"{folder}: {', '.join(bad)}; resume from another checkpoint (checkpoints/latest names it)")


def damage_of_share(folder: Path, rank: int, world_size: int) -> list[str]:
    """Return what is wrong with this rank's share of the files. Raises UserError without SHA256SUMS, or OSError."""
    expected = read_sums(folder)
    unlisted = [path.relative_to(folder).as_posix() for path in folder.glob("policy/*") if path.is_file()]
    return damage_of(folder, _share(folder, {*expected, *unlisted}, rank, world_size))


def damage_of(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns which of these files are not there or not what was written. Raises OSError."""
    expected = read_sums(folder)
    bad = []
    for name in names:
        if not (folder / name).is_file():
            bad.append(f"{name} is missing")
        elif name not in expected:
            bad.append(f"{name} is not in {SUMS_NAME}")
        elif digest_of(folder / name) != expected[name]:
            bad.append(f"{name} is damaged")
    return bad


def read_sums(folder: Path) -> dict[str, str]:
    """Read SHA256SUMS of a folder: relative path -> SHA-256.

    Raises UserError when there is no such file, or it is not one of `sha256sum`.
    """
    path = folder / SUMS_NAME
    try:
        lines = ordinary(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is {folder} a checkpoint of this program?") from None
    matches = [re.fullmatch(r"([0-9a-f]{64})  ((?!/)(?!.*\.\.).+)", line) for line in lines]
    if not lines or not all(matches):
        raise UserError(f"{path}: not lines of `sha256sum`; resume from another checkpoint")
    return {match[2]: match[1] for match in matches if match}


def _share(folder: Path, names: Iterable[str], rank: int, world_size: int) -> list[str]:
    """Return a rank's share of the files; the largest ones go to different ranks.

    The shares are disjoint and complete as long as every rank sees the same folder.
    """
    sizes = {name: (folder / name).stat().st_size if (folder / name).is_file() else 0 for name in names}
    return sorted(sizes, key=lambda name: (-sizes[name], name))[rank::world_size]


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal. Raises OSError."""
    with ordinary(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
