"""Data files: every kind is read, packed or not, with a byte-order mark or without; none takes the memory away."""

from __future__ import annotations

import csv
import gzip
import json

import pytest

from megatron_powerflow.data import rows
from megatron_powerflow.errors import UserError

ROWS = [{"question": "What is 1 + 1?", "answer": "2"}, {"question": "Wie groß?", "answer": "3"}]
BOM = b"\xef\xbb\xbf"


def content(kind: str) -> bytes:
    if kind == ".json":
        return json.dumps(ROWS, ensure_ascii=False).encode()
    if kind == ".csv":
        return "question,answer\r\nWhat is 1 + 1?,2\r\nWie groß?,3\r\n".encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path) -> tuple[list, list]:
    violations: list[str] = []
    return [row for _, row in rows.read_file(path, violations)], violations


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv"])
@pytest.mark.parametrize("start", [b"", BOM])
@pytest.mark.parametrize("packed", [False, True])
def test_every_kind_is_read(tmp_path, kind, start, packed):
    path = tmp_path / f"data{kind}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(start + content(kind)) if packed else start + content(kind))
    assert read(path) == (ROWS, [])


def test_lines_in_a_file_that_is_called_json(tmp_path):
    for start in (b"", BOM, b"\n \n", BOM + b"\n"):
        path = tmp_path / "data.json"
        path.write_bytes(start + content(".jsonl"))
        assert read(path) == (ROWS, [])


def test_numbers_are_those_of_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\n{"a": 1}\nnonsense\n{"a": 2}\n')
    violations: list[str] = []
    assert [number for number, _ in rows.read_file(path, violations)] == [2, 4]
    assert violations[0].startswith(f"{path}:3: not a line of JSON")
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], ["1", "two\nlines"], ["3"], ["4", "5"]])
    assert [number for number, _ in rows.read_file(tmp_path / "data.csv", violations)] == [2, 5]
    assert "data.csv:4: not as many fields as the 2 columns" in violations[-1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.txt", b"hello", "its name ends in .txt"),
        ("data", b"hello", "its name ends in nothing"),
        ("data.parquet.gz", b"", "its name ends in .gz"),
        ("data.parquet", b"PAR1 and nothing", "not a parquet file that can be read"),
        ("data.jsonl.gz", b"no gzip at all", "cannot be read"),
        ("data.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "cannot be read"),
        ("data.json", b"[1, 2", "not a JSON list that can be read"),
        ("data.json", b"[" * 100_000, "not a JSON list that can be read"),
        ("data.csv", b"", "empty; the first line"),
        ("data.csv", b'a\n"\n', "not a CSV file that can be read"),
        ("data.csv", b"a\n\xff\xfe\n", "not a CSV file that can be read"),
    ],
)
def test_a_file_that_is_none_of_its_kind_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_small_file_that_unpacks_to_any_size_is_refused(tmp_path, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr(rows, "MAX_BYTES", 2**20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b" " * (64 * 2**20)))
    with pytest.raises(UserError, match="unpacks to over"):
        read(path)
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["x" * 100_000] * 1000}), path, compression="zstd")
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="unpacks to over"):
        read(path)
