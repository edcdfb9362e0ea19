"""Which rows does a data file hold? JSONL, a JSON list, CSV or parquet, by the file's name.

Every row is a dict without its empty fields (null; in CSV, of no characters). It has a number for messages: its line in
JSONL, the first of its lines in CSV, its place from 1 in a JSON list or parquet.

Left out: what the columns mean (`readers.py`).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_powerflow.data.prompts import is_unicode, read_rows
from megatron_powerflow.errors import UserError

KINDS = (".jsonl", ".json", ".csv", ".parquet")
Row = dict[str, Any]


def read_file(path: Path, violations: list[str]) -> list[tuple[int, Row]]:
    """(number, row) of the rows that can be read; the others are added to `violations`.

    Raises UserError for a file that is not there or not of its kind at all.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give one of {', '.join(KINDS)}")
    if path.suffix not in KINDS:
        raise UserError(f"{path}: its name ends in {path.suffix or 'nothing'}; readable are {', '.join(KINDS)}")
    if path.suffix == ".csv":
        rows = _read_csv(path, violations)
    elif path.suffix == ".json" and _starts_a_list(path):
        rows = _read_list(path, violations)
    else:
        rows = read_rows(path, violations)
    return [(number, {key: value for key, value in row.items() if value is not None}) for number, row in rows]


def _read_csv(path: Path, violations: list[str]) -> Iterator[tuple[int, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if not reader.fieldnames:
                raise UserError(f"{path}: empty; the first line of a CSV file names its columns")
            first = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    violations.append(f"{path}:{first}: not as many fields as the {len(reader.fieldnames)} columns")
                else:
                    yield first, {name: value for name, value in row.items() if value}
                first = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file that can be read: {error}") from None


def _starts_a_list(path: Path) -> bool:
    """Some data sets call JSONL .json."""
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _read_list(path: Path, violations: list[str]) -> Iterator[tuple[int, Row]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON list that can be read: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            violations.append(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
        elif not is_unicode(row):
            violations.append(f"{path}:{number}: holds half of a surrogate pair, which is no text")
        else:
            yield number, row
