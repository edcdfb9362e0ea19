"""What does a file of a run folder say, when nothing about it can be trusted?

A damaged line or a value that is no number is left out and named in a note, never guessed and never fatal: a report of
a run that is still going, or that crashed, is worth having.

Left out: what the numbers mean (`runs.py`); escaping for HTML, which is the template's (autoescape).
"""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path
from typing import Any

import yaml

from megatron_powerflow.journal import Check, notes_of, read_journal

MAX_JSON_BYTES = 512 * 2**20
MAX_YAML_BYTES = 2**20
LARGEST, SMALLEST = 1e100, 1e-100  # beyond them an axis overflows; nothing that trains reaches them


def number(value: Any) -> float | None:
    """Return a finite float; None for NaN, infinity, absurd sizes, text, booleans and everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    if not math.isfinite(value) or abs(value) > LARGEST:
        return None
    return value if abs(value) > SMALLEST else 0.0


def visible(value: Any, limit: int) -> str:
    """Show a value as text of at most `limit` characters, with invisible and direction-changing ones spelt out."""
    text = value if isinstance(value, str) else str(value)
    shown = "".join(char if _prints(char) else f"\\u{ord(char):04x}" for char in text[:limit])
    return shown if len(text) <= limit else f"{shown} … ({len(text) - limit:,} more characters)"


def _prints(char: str) -> bool:
    return char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def read_json_lines(
    path: Path, notes: list[str], check: Check | None = None, *, start: bytes = b"{"
) -> list[dict[str, Any]]:
    """Read the JSON objects of a journal; [] when there is no file. Damaged lines are left out and noted.

    check, start: as for `read_journal`.
    """
    if _is_too_large(path, MAX_JSON_BYTES, notes):
        return []
    journal = read_journal(path, check, start=start)
    notes += notes_of(path, journal.damages)
    return journal.lines


def read_json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """Read the object in a JSON file. Returns None without a file, and None with a note when it is no object."""
    text = _text(path, MAX_JSON_BYTES, notes)
    value = None if text is None else _parsed(text)
    if isinstance(value, dict):
        return value
    if text is not None:
        notes.append(f"{path}: no JSON object, left out")
    return None


def read_config(path: Path, notes: list[str]) -> dict[str, str] | None:
    """Read a resolved config as {"section.key": text}. Returns None without a file, and None with a note when it is
    unreadable.

    It is read as plain YAML, not as `Config`: a report also shows runs of another version of this program. Anchors
    are refused: ours never writes them, and they can make a small file enormous.
    """
    text = _text(path, MAX_YAML_BYTES, notes)
    if text is None:
        return None
    try:
        sections = yaml.load(text, _PlainLoader)  # a SafeLoader: makes no objects
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        notes.append(f"{path}: not YAML that can be read ({visible(' '.join(str(error).split()), 120)}), left out")
        return None
    if not isinstance(sections, dict):
        notes.append(f"{path}: holds no sections, left out")
        return None
    return {
        visible(f"{section}.{key}", 80): _leaf(value)
        for section, values in sections.items()
        if isinstance(values, dict)
        for key, value in values.items()
    }


def _leaf(value: Any) -> str:
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        value = ", ".join(visible(item, 300) for item in value[:100])
    if isinstance(value, list | dict):
        return "(nested)"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else visible(value, 300)


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("anchors and aliases are not read")
        return super().compose_node(parent, index)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_too_large(path: Path, max_bytes: int, notes: list[str]) -> bool:
    size = path.stat().st_size if path.is_file() else 0
    if size > max_bytes:
        notes.append(f"{path}: {size:,} bytes, more than the {max_bytes:,} that are read; left out")
    return size > max_bytes


def _text(path: Path, max_bytes: int, notes: list[str]) -> str | None:
    if not path.is_file() or _is_too_large(path, max_bytes, notes):
        return None
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path}: cannot be read ({error.strerror}), left out")
        return None
