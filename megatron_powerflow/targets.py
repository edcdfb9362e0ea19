"""May a path that a user named be written, and how does a new folder replace an older one without loss?

A folder is written whole under OUT.partial and gets its name at the end. What stands under one of these names is
replaced only where its mark says that the same kind of command wrote it, and it holds nothing else:

    OUT/conversion.json    {"made_by": ..., "files": [...], ...}; transformers and vLLM pass over it

What the disk holds after a kill, and what the next try does with it:

    while writing                         OUT is the older one; OUT.partial, marked unfinished, is removed
    between the two renames               OUT.old is the older one and gets its name back; OUT.partial is removed
    when OUT.partial has become OUT       OUT is the new one; OUT.old is removed

Left out: who may write at the same time (`parallel/owner.py`); what is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import give_usual_mode, is_partial_of, sync, write_file

MARK_NAME = "conversion.json"
SHOWN_FILES = 3
START_BYTES = 2**20  # of a file, read to see who wrote it


@dataclass(frozen=True)
class TargetFolder:
    """A folder that a command writes whole. made_by: the kind of command; only its own work may be replaced.

    label: what the path is called in messages.
    """

    out: Path
    made_by: str
    label: str = "--out"

    @property
    def real(self) -> Path:
        """Return OUT's path with every link resolved."""
        return self.out.resolve()

    @property
    def partial(self) -> Path:
        """Return the path under which OUT is written until it is whole."""
        return self.real.with_name(self.real.name + ".partial")

    @property
    def old(self) -> Path:
        """Return the path of the older OUT while it is being replaced."""
        return self.real.with_name(self.real.name + ".old")

    @property
    def lock(self) -> Path:
        """Return the path of the lock of who writes OUT."""
        return self.real.with_name(self.real.name + ".lock")

    def refusals(self, *, apart_from: Sequence[Path] = (), not_over: Sequence[Path] = ()) -> list[str]:
        """Return why this folder may not be written, a sentence each; [] when it may. Reads only.

        apart_from: neither may lie in the other (the source model, a checkpoint). not_over: the target may lie in
        them, and may not be or hold them (a run's folder); the current folder and the home always count among these.
        """
        try:
            return self._refusals(apart_from, not_over)
        except (OSError, RuntimeError) as error:  # no permission, a name that is too long, links in a circle
            return [f"{self.label} {self.out}: cannot be looked at ({error}); name another folder"]

    def _refusals(self, apart_from: Sequence[Path], not_over: Sequence[Path]) -> list[str]:
        name = f"{self.label} {self.out}"
        if self.out.is_symlink():
            return [f"{name}: a link to {os.readlink(self.out)}; name the folder itself, or one that is not there"]
        real = self.real
        for path in apart_from:
            other = path.resolve()
            if real.is_relative_to(other) or other.is_relative_to(real):
                return [f"{name}: one of it and {path} lies in the other; write elsewhere"]
        for path in (*not_over, *_user_folders()):
            if path.resolve().is_relative_to(real):
                return [f"{name}: is or holds {path}, which is not to be replaced; name a new folder"]
        if real.parent == real or os.path.ismount(real):
            return [f"{name}: the top of a file system, which cannot be replaced; name a folder in it"]
        above = next(folder for folder in real.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            return [f"{name}: {above} is {'no folder' if not above.is_dir() else 'not writable'}; write elsewhere"]
        refusals = []
        if reason := self._not_ours(real):
            refusals.append(f"{name}: {reason}; name a folder that is not there")
        for beside in (self.partial, self.old):
            if reason := self._not_ours(beside, unfinished=beside == self.partial):
                refusals.append(f"{name}: {beside} is in the way: {reason}; move it away or name another folder")
        return refusals

    def is_there(self) -> bool:
        """Whether an older folder would be replaced."""
        return self.real.is_dir() and any(self.real.iterdir())

    def begin(self) -> Path:
        """Make OUT.partial, marked unfinished, after putting in order what a killed try left. Returns it.

        Raises UserError where something came in the way since it was judged, OSError where the disk refuses.
        """
        self._judge_again()
        if self.old.is_dir():
            if self.is_there():
                _remove(self.old)
            else:
                if self.real.is_dir():
                    self.real.rmdir()
                self.old.rename(self.real)
        if self.partial.is_dir():
            _remove(self.partial)
        self.partial.mkdir(parents=True)
        self._write_mark(files=None)
        return self.partial

    def publish(self, **about: Any) -> None:
        """Mark OUT.partial as whole, sync it to the disk and rename it to OUT. about: what the mark states beside.

        Raises UserError where OUT came to hold other files meanwhile, OSError where the disk refuses.
        """
        self._judge_again()
        self._write_mark(files=[MARK_NAME, *(name for name in _names(self.partial) if name != MARK_NAME)], **about)
        for path in (*self.partial.rglob("*"), self.partial):
            if path.is_file():
                give_usual_mode(path)
            sync(path)
        if self.is_there():
            self.real.rename(self.old)
        try:
            self.partial.rename(self.real)  # also onto an empty folder
        except OSError:
            if self.old.is_dir():
                self.old.rename(self.real)
            raise
        sync(self.real.parent)
        if self.old.is_dir():
            _remove(self.old)

    def abandon(self) -> None:
        """Remove OUT.partial, if it is ours."""
        with contextlib.suppress(OSError):
            if self.partial.is_dir() and not self._not_ours(self.partial, unfinished=True):
                _remove(self.partial)

    def _judge_again(self) -> None:
        if refusals := self.refusals():
            raise UserError(refusals)

    def _not_ours(self, folder: Path, *, unfinished: bool = False) -> str | None:
        """Return why `folder` may not be removed; None: it may, is empty or is not there."""
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            return "it is no folder"
        if not folder.exists():
            return None
        names = _names(folder)
        if not names or (unfinished and all(is_partial_of(name, (MARK_NAME,)) for name in names)):
            return None  # killed before it was marked
        mark = _read_object(folder / MARK_NAME)
        if mark is None or mark.get("made_by") != self.made_by:
            return f"it exists and no {self.made_by} wrote it (it holds {_some(names)})"
        files = mark.get("files")
        if files is None and unfinished:
            return None
        if not isinstance(files, list):
            return f"it exists and is no finished work of {self.made_by} (it holds {_some(names)})"
        foreign = [name for name in names if name not in files]
        return f"it holds what no {self.made_by} wrote ({_some(foreign)}); move that away first" if foreign else None

    def _write_mark(self, *, files: list[str] | None, **about: Any) -> None:
        values = {"made_by": self.made_by, **about, "files": files}
        write_file(self.partial / MARK_NAME, json.dumps(values, indent=2) + "\n")


def export_target(out: Path, *, label: str = "--out") -> TargetFolder:
    """Return the target of `powerflow export`, and of the export at the end of a run."""
    return TargetFolder(out, "powerflow export", label)


def require(refusals: Sequence[str]) -> None:
    """Raise UserError with the refusals, if there are any."""
    if refusals:
        raise UserError(refusals)


def file_refusals(path: Path, is_ours: Callable[[bytes], bool], *, label: str = "--out") -> list[str]:
    """Return why a file may not be written; [] when it may. A file that another program wrote may not be replaced.

    is_ours: called with the first MiB of a file that exists. An empty file may be replaced.
    """
    try:
        name = f"{label} {path}"
        if path.is_symlink():
            return [f"{name}: a link to {os.readlink(path)}; name the file itself, or one that is not there"]
        if path.is_dir():
            return [f"{name}: a folder; name a file"]
        if not path.parent.is_dir():
            return [f"{name}: {path.parent} is no folder; make it first, or write elsewhere"]
        if not path.exists():
            return []
        if not path.is_file():
            return [f"{name}: no ordinary file; name another one"]
        with path.open("rb") as file:
            start = file.read(START_BYTES)
    except OSError as error:
        return [f"{label} {path}: cannot be looked at ({error}); name another file"]
    if start and not is_ours(start):
        return [f"{name}: exists and this command did not write it; name a file that is not there"]
    return []


def starts_with_line_of(*kinds: Sequence[str]) -> Callable[[bytes], bool]:
    """Return an `is_ours` for `file_refusals`, which recognises JSON lines by the keys of the first.

    kinds: the keys of each kind of line. A first line that is cut must begin like one.
    """
    begins = [f'{{"{keys[0]}": '.encode() for keys in kinds]

    def is_ours(start: bytes) -> bool:
        line, end, _ = start.partition(b"\n")
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            return not end and any(line.startswith(begin) or begin.startswith(line) for begin in begins)
        return isinstance(values, dict) and any(values.keys() == set(keys) for keys in kinds)

    return is_ours


def _user_folders() -> Iterator[Path]:
    for folder_of in (Path.cwd, Path.home):
        with contextlib.suppress(OSError, RuntimeError):
            yield folder_of()


def _names(folder: Path) -> list[str]:
    """Return everything that is no folder, and every empty folder, relative to `folder`."""
    paths = []
    for where, folders, files in os.walk(folder):
        directory = Path(where)
        links = [name for name in folders if (directory / name).is_symlink()]
        paths += [directory / name for name in (*files, *links)]
        if not folders and not files and directory != folder:
            paths.append(directory)
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_bytes()) if path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_FILES
    return ", ".join(names[:SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")


def _remove(folder: Path) -> None:
    """Remove a folder, its mark last: a removal that was killed leaves a folder that is still known as ours."""
    for path in folder.iterdir():
        if path.name == MARK_NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (folder / MARK_NAME).unlink(missing_ok=True)
    folder.rmdir()
