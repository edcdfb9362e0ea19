"""How does a file grow line by line, so that no crash and no damage costs more than the lines it hit?

A journal is a file of JSON objects, one a line. A line that was appended is on the disk. A line that is torn (a kill
while it was written), zeroed (a power cut) or damaged in any other way costs itself: readers get every other line, and
the damage by line number. Lines end at "\\n" and nowhere else: a JSON string may hold U+2028 and U+0085 as they are.

Left out: what the lines mean; files that are written whole (`whole_files.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_powerflow.whole_files import ordinary, own_file, sync, whole_file

MAX_LINE_BYTES = 64 * 2**20
HEAD_BYTES = 64
SHOWN_DAMAGES = 5  # of a file, in a note
STEP_AT_START = re.compile(rb'\{"step": ?(\d{1,15})[,}]')
Line = dict[str, Any]
Check = Callable[[Line], str | None]  # what is wrong with an object; None: nothing


@dataclass(frozen=True, slots=True)
class Damage:
    """A damage is a line that cannot be used. line: its number, from 1; what: why."""

    line: int
    what: str


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal holds: the lines that can be used, oldest first, and what is damaged."""

    lines: list[Line]
    damages: list[Damage]


@dataclass(frozen=True, slots=True)
class Cut:
    """What `cut_back` did. kept: the lines that can be used; num_cut: whole lines that went; damages: what is damaged
    in the file as it is now."""

    kept: list[Line]
    num_cut: int
    damages: list[Damage]


def append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Appends the objects, which are on the disk when the function returns.

    A torn last line is ended first, so that it does not swallow what follows. Raises OSError that names `path`; nothing
    of the lines is in the file then, as far as the disk lets them be taken back.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    content = text.encode("utf-8", errors="backslashreplace")  # a lone surrogate becomes JSON's \ud800
    try:
        new = not own_file(path).exists()
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                content = b"\n" + content
            _write_all(descriptor, content, size)
        finally:
            os.close(descriptor)
        if new:
            sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_all(descriptor: int, content: bytes, size: int) -> None:
    """Write and sync; back to `size` bytes where that fails."""
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):  # else the line stays torn, which the next reader names
            os.ftruncate(descriptor, size)
        raise


def read_journal(path: Path, check: Check | None = None, *, start: bytes = b"{") -> Journal:
    """Reads every line that can be used; none where there is no file. A file that cannot be read is a damage of line 0.

    check: says what is wrong with an object, beside being one. start: how a whole line begins, for one that follows a
    torn line without a line's end between them: it is found again where `start` is longer than "{".
    """
    lines, damages = [], []
    try:
        for piece in _pieces(path, check, start):
            if piece.damage:
                damages.append(Damage(piece.number, piece.damage))
            if piece.line is not None:
                lines.append(piece.line)
    except OSError as error:
        damages.append(Damage(0, f"cannot be read ({error.strerror})"))
    return Journal(lines, damages)


def notes_of(path: Path, damages: Sequence[Damage]) -> list[str]:
    """Says what is damaged in a file, a note for each of the first lines. Example: run/metrics.jsonl:3: not JSON; this
    line is left out."""
    notes = [
        f"{path}:{damage.line}: {damage.what}; this line is left out, and no other"
        if damage.line
        else f"{path}: {damage.what}; left out"
        for damage in damages[:SHOWN_DAMAGES]
    ]
    if (more := len(damages) - SHOWN_DAMAGES) > 0:
        notes.append(f"{path}: {more} more damaged lines are left out")
    return notes


def cut_back(path: Path, first_step: int, check: Check, *, start: bytes = b"{") -> Cut:
    """Takes away the lines of `first_step` and later steps, which are of a try that was lost.

    A damaged line of an earlier step stays in the file as it is, for whoever can mend it; it is of the lost try where
    its own beginning says so, where it stands behind a line of that try, or where it is a torn end of unknown step.
    The file is replaced, whole, only where something goes. check: refuses lines without a number `step`. Raises
    OSError.
    """
    pieces = [*_pieces(path, check, start)]
    kept: list[_Piece] = []
    num_cut, lost = 0, False
    for piece in pieces:
        if piece.line is not None:
            lost = piece.line["step"] >= first_step
            num_cut += lost
        elif (step := STEP_AT_START.match(piece.head)) is not None:
            lost = int(step[1]) >= first_step
        elif piece is pieces[-1] and not piece.ended:
            lost = True
        if not lost:
            kept.append(piece)
    if changed := len(kept) < len(pieces):
        _copy(path, kept)
    numbers = [place if changed else piece.number for place, piece in enumerate(kept, start=1)]
    damages = [Damage(number, piece.damage) for number, piece in zip(numbers, kept, strict=True) if piece.damage]
    return Cut([piece.line for piece in kept if piece.line is not None], num_cut, damages)


def _copy(path: Path, pieces: Sequence[_Piece]) -> None:
    """Replace a file by these pieces of it."""
    with path.open("rb") as old, whole_file(path) as new:
        for piece in pieces:
            old.seek(piece.begin)
            left = piece.end - piece.begin
            while left and (block := old.read(min(left, MAX_LINE_BYTES))):
                new.write(block)
                left -= len(block)
            if not piece.ended:
                new.write(b"\n")


@dataclass(frozen=True, slots=True)
class _Piece:
    """What stands between two line ends; of a damaged line that a whole one follows without an end between them, each
    of the two. number: of the line, from 1; begin, end: bytes of the file, the line's end included; head: its first
    bytes; ended: whether it has an end; line: the object that can be used, if any; damage: what is wrong, "" for
    nothing."""

    number: int
    begin: int
    end: int
    head: bytes
    ended: bool
    line: Line | None
    damage: str


def _pieces(path: Path, check: Check | None, start: bytes) -> Iterator[_Piece]:
    """Raises OSError."""
    if not ordinary(path).exists():
        return
    with path.open("rb") as file:
        number = begin = 0
        while raw := file.readline(MAX_LINE_BYTES):
            number, end, head = number + 1, begin + len(raw), raw[:HEAD_BYTES]
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(MAX_LINE_BYTES)
                    end += len(raw)
                line, damage = (
                    None,
                    f"a line of {end - begin:,} bytes; at most {MAX_LINE_BYTES:,} are read",
                )
            else:
                line, damage = _parsed(raw, check)
                if damage and len(start) > 1 and (place := raw.rfind(start)) > 0:
                    second, still_damaged = _parsed(raw[place:], check)
                    if not still_damaged:
                        yield _Piece(number, begin, begin + place, head, False, None, damage)
                        begin, head, line, damage = begin + place, raw[place:][:HEAD_BYTES], second, ""
            yield _Piece(number, begin, end, head, raw.endswith(b"\n"), line, damage)
            begin = end


def _parsed(raw: bytes, check: Check | None) -> tuple[Line | None, str]:
    if not raw.strip():
        return None, "empty"
    if not raw.strip(b"\0\n"):
        return None, "zeros, as a power cut leaves them"
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"no UTF-8 at byte {error.start + 1}"
    except (ValueError, RecursionError):
        return None, "not JSON" if raw.endswith(b"\n") else "torn: it has no end"
    if not isinstance(value, dict):
        return None, "not a JSON object"
    if check and (wrong := check(value)):
        return None, wrong
    return value, ""
