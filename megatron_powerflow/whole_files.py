"""How is a file written so that whoever reads it finds the old one or the new one, whatever happens meanwhile?

By way of a new file beside it, which is on the disk before it takes the name. Left out: whole folders (`targets.py`),
and files that grow line by line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".partial"


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, which is `path` when the block ends and nothing when it raises. Raises OSError that names
    `path`."""
    with _naming(path):
        descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL_SUFFIX, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            give_usual_mode(Path(partial))  # mkstemp's own is for secrets
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.unlink(partial)
            raise
        sync(path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """A write to a full disk raises without a name, and what is being made has a name that nobody knows."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (error.filename is None or str(error.filename).endswith(PARTIAL_SUFFIX)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_file(path: Path, content: bytes | str) -> None:
    """The whole file or none of it; a text in UTF-8. Raises OSError."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def is_partial_of(name: str, files: tuple[str, ...]) -> bool:
    """Return whether a file of this name is what a kill in `whole_file` left of one of these files."""
    return meant_by(name) in files


def meant_by(name: str) -> str | None:
    """Return the name of the file that a kill in `whole_file` left unfinished under this name; None for any other.

    Only a name that mkstemp makes counts, .NAME.xxxxxxxx.partial: a user's .NAME.old.partial is the user's.
    """
    match = re.fullmatch(rf"\.(.+)\.[a-z0-9_]{{8}}{re.escape(PARTIAL_SUFFIX)}", name)
    return match[1] if match else None


def give_usual_mode(path: Path) -> None:
    """What a file has that is opened and written: the umask's mode. safetensors leaves files that their owner alone can
    read, which a server under another user then cannot serve."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def ordinary(path: Path) -> Path:
    """Return the path of a file that is about to be read.

    Raises OSError where something else stands there: a device has no end, and a pipe makes its reader wait.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "no ordinary file", str(path))
    return path


def own_file(path: Path) -> Path:
    """Return the path of a file that is about to be written to where it stands.

    Raises OSError where something else stands there than an ordinary file, or a link to a file of another name: a
    folder may come from anybody, and what a link in it names is somebody else's. A user who keeps a journal on another
    disk keeps its name.
    """
    if path.is_symlink() and Path(os.path.realpath(path)).name != path.name:
        raise OSError(errno.ELOOP, "a link to a file of another name, through which nothing is written", str(path))
    return ordinary(path)


def sync(path: Path) -> None:
    """Have the kernel write a file or folder out."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
