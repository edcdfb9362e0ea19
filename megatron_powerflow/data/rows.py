"""Which rows does a data file hold? JSONL, a JSON list, CSV or parquet, by the file's name, each also as .gz.

Every row is a dict without its empty fields (null; in CSV, of no characters). It has a number for messages: its line in
JSONL, the first of its lines in CSV, its index from 1 in a JSON list or parquet. A byte-order mark is skipped.

Left out: what the columns mean (`prompt_rows.py`, `evaluation/readers.py`).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_powerflow.errors import UserError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
# A file of a few kB can unpack to any size: so many bytes of it are read, and for each byte of the file so many more.
MAX_BYTES, FEW_BYTES, BYTES_PER_BYTE = 8 * 2**30, 2**28, 200
BATCH_ROWS = 1024  # of parquet at a time
BOM = b"\xef\xbb\xbf"
Row = dict[str, Any]


def read_file(path: Path, violations: list[str]) -> Iterator[tuple[int, Row]]:
    """Yields (number, row) of the rows that can be read; the others are added to `violations`.

    Raises UserError for a file that does not exist or is not of its kind at all.
    """
    if not path.is_file():
        what = "no such file" if not path.exists() else "no ordinary file"
        raise UserError(f"{path}: {what}; give one of {', '.join(KINDS)}")
    kind = _kind(path)
    try:
        if kind == ".parquet":
            rows = _read_parquet(path)
        else:
            with _open(path) as file:
                rows = _readers()[kind](path, file, violations)
                yield from ((number, _without_empty_fields(row)) for number, row in rows)
            return
        yield from ((number, _without_empty_fields(row)) for number, row in rows)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}; copy it again") from None


def _kind(path: Path) -> str:
    """Returns the ending that says how the file is to be read. Raises UserError for an unknown one."""
    name = path.name.lower().removesuffix(".gz")
    kind = next((kind for kind in KINDS if name.endswith(kind)), None)
    if kind is None or (kind == ".parquet" and path.name.lower().endswith(".gz")):
        ending = path.suffix or "nothing"
        raise UserError(
            f"{path}: its name ends in {ending}; readable are {', '.join(KINDS)}, and .gz of all but the last"
        )
    return kind


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return io.BufferedReader(_BoundedGzip(path))
    return path.open("rb")


class _BoundedGzip(io.RawIOBase):
    """Unpacks a gzip file as it is read, up to MAX_BYTES."""

    def __init__(self, path: Path) -> None:
        self._path, self._left = path, _allowed_bytes(path)
        self._file = gzip.GzipFile(path, "rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise _too_large(self._path)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _allowed_bytes(path: Path) -> int:
    return min(MAX_BYTES, FEW_BYTES + BYTES_PER_BYTE * path.stat().st_size)


def _too_large(path: Path) -> UserError:
    size, allowed = path.stat().st_size, _allowed_bytes(path)
    return UserError(
        f"{path}: unpacks to over {allowed / 2**20:,.0f} MiB, of {size:,} bytes; give a part of it, or unpack it first"
    )


def _without_empty_fields(row: Row) -> Row:
    return {key: value for key, value in row.items() if value is not None}


def _readers() -> dict[str, Any]:
    return {".jsonl": _read_lines, ".ndjson": _read_lines, ".json": _read_json, ".csv": _read_csv}


def _read_lines(path: Path, file: IO[bytes], violations: list[str], start: bytes = b"") -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(file, start=1):
        line = (start + line).removeprefix(BOM) if number == 1 else line
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # ValueError: also numbers of over 4,300 digits
            violations.append(f"{path}:{number}: not a line of JSON: {error}")
            continue
        if b"\\u" in line and not is_unicode(row):
            violations.append(f"{path}:{number}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text")
        elif not isinstance(row, dict):
            violations.append(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
        else:
            yield number, row


def _read_json(path: Path, file: IO[bytes], violations: list[str]) -> Iterator[tuple[int, Row]]:
    """Yields the rows of a JSON list; or of lines, as some data sets call JSONL."""
    start = file.read(1)
    while start and (not start.strip() or BOM.startswith(start)):
        start = start + file.read(1) if BOM.startswith(start) and start != BOM else file.read(1)
    if start != b"[":
        yield from _read_lines(path, file, violations, start)
        return
    try:
        rows = json.loads((start + file.read()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON list that can be read: {error}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            violations.append(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
        elif not is_unicode(row):
            violations.append(f"{path}:{number}: holds half of a surrogate pair, which is no text")
        else:
            yield number, row


def _read_csv(path: Path, file: IO[bytes], violations: list[str]) -> Iterator[tuple[int, Row]]:
    try:
        reader = csv.DictReader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
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


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install pyarrow, or convert to JSONL") from None
    number, left = 0, _allowed_bytes(path)
    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]
            if sum(groups) > left:
                raise _too_large(path)
            # each row of a batch may hold the largest value of its row group: a dictionary stores it once
            rows = max(1, min(BATCH_ROWS, left // max([1, *groups])))
            for batch in file.iter_batches(batch_size=rows):
                values = batch.to_pylist()
                left -= max(batch.nbytes, sum(map(_size, values)))  # a dictionary of Arrow's is unpacked here only
                if left < 0:
                    raise _too_large(path)
                for row in values:
                    number += 1
                    yield number, row
    except UserError:
        raise
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file that can be read: {error}") from None


def _size(value: Any) -> int:
    """Returns about how many bytes a value of a row takes."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def is_unicode(row: Any) -> bool:
    """Whether all texts of a row are valid Unicode: JSON can spell half a character, which no tokenizer takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
