"""A damaged line costs itself, by name, and no line behind it; what was appended stays whatever comes after."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow import journal
from megatron_powerflow.journal import SHOWN_DAMAGES, append_lines, cut_back, notes_of, read_journal
from megatron_powerflow.metrics.step_log import START, without_step
from megatron_powerflow.metrics.writers import JsonlWriter, read_metrics
from megatron_powerflow.records import StepMetrics

TEXTS = ("plain", "two\u2028lines", "\x85", 'quote " and {"step": 7}', "\\n", "ü" * 5)


def lines_of(count: int) -> list[dict]:
    return [{"step": step, "text": TEXTS[step % len(TEXTS)], "in": {"a": [1]}} for step in range(count)]


def read(path: Path):
    return read_journal(path, without_step, start=START)


@given(st.data())
def test_any_damage_costs_the_lines_that_it_hit_and_names_them(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("journal") / "x.jsonl"
    lines = lines_of(data.draw(st.integers(1, 8)))
    append_lines(path, lines)
    content = path.read_bytes()
    begin = data.draw(st.integers(0, len(content) - 1))
    end = data.draw(st.integers(begin + 1, min(len(content), begin + 90)))
    fill = data.draw(st.one_of(st.just(b"\0"), st.just(b"\xff"), st.just(b"x"), st.just(b"\n"), st.just(b"")))
    path.write_bytes(content[:begin] + fill * (end - begin) + content[end:])
    place, spared = 0, []
    for line in lines:
        size = len(json.dumps(line, ensure_ascii=False).encode()) + 1
        if place + size <= begin or place >= end:
            spared.append(line)
        place += size
    found = read(path)
    assert [line for line in found.lines if line in spared] == spared
    others = [line for line in found.lines if line not in spared]  # a cut that leaves a JSON object cannot be seen
    if len(spared) < len(lines) and not others and found.lines == spared:
        whole = begin == 0 or content[begin - 1 : begin] == b"\n"
        assert found.damages or (fill == b"" and whole)  # lines that are gone without a trace
    for damage, note in zip(found.damages[:SHOWN_DAMAGES], notes_of(path, found.damages), strict=False):
        assert note.startswith(f"{path}:{damage.line}: ")


@given(st.integers(1, 6), st.integers(0, 200), st.integers(0, 7))
def test_a_torn_end_does_not_swallow_what_is_appended(tmp_path_factory, count, cut, first_step):
    path = tmp_path_factory.mktemp("journal") / "x.jsonl"
    append_lines(path, lines_of(count))
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)])
    whole = read(path).lines
    append_lines(path, [{"step": 99}])
    assert read(path).lines == [*whole, {"step": 99}]
    kept = cut_back(path, first_step, without_step, start=START).kept
    append_lines(path, [{"step": first_step}])
    assert read(path).lines == [*kept, {"step": first_step}]
    assert kept == [line for line in whole if line["step"] < first_step]


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (b"\0" * 4096 + b"\n", "zeros"),
        (b'{"step": 1, "x": "\xff"}\n', "no UTF-8 at byte 19"),
        (b"[1]\n", "not a JSON object"),
        (b"null\n", "not a JSON object"),
        (b'{"loss": 1}\n', "without a usable step"),
        (b'{"step": true}\n', "without a usable step"),
        (b'{"step": -1}\n', "without a usable step"),
        (b'{"step": 1.0}\n', "without a usable step"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"1" * 5000 + b"\n", "not JSON"),
        (b"\n", "empty"),
        (b'{"step": 1, "x"', "torn"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_and_the_next_one_is_read(tmp_path, raw, what):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0}\n' + raw)
    append_lines(path, [{"step": 2}])
    found = read(path)
    assert [line["step"] for line in found.lines] == [0, 2]
    ((damage, note),) = zip(found.damages, notes_of(path, found.damages), strict=True)
    assert damage.line == 2
    assert note.startswith(f"{path}:2: ")
    if what != "torn":  # once another line stands behind it, it has an end
        assert what in note


def test_a_line_without_end_is_read_no_further_than_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "MAX_LINE_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1, "x": "' + b"y" * 1000 + b'"}\n{"step": 2}\n')
    found = read(path)
    assert [line["step"] for line in found.lines] == [0, 2]
    assert [damage.line for damage in found.damages] == [2]
    assert cut_back(path, 1, without_step).kept == [{"step": 0}]
    assert path.read_bytes() == b'{"step": 0}\n'


def test_a_cut_keeps_damaged_lines_of_finished_steps_and_replaces_nothing_without_need(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1, "x\n\0\0\0\n{"step": 3}\n{"step": 4}\n{"step": 5, "x')
    content, inode = path.read_bytes(), path.stat().st_ino
    assert cut_back(path, 6, without_step, start=START).kept == [{"step": step} for step in (0, 3, 4)]
    assert (path.read_bytes(), path.stat().st_ino) == (content, inode)
    cut = cut_back(path, 4, without_step, start=START)
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1, "x\n\0\0\0\n{"step": 3}\n'
    assert (cut.num_cut, [damage.line for damage in cut.damages]) == (1, [2, 3])


def test_a_torn_end_that_does_not_say_its_step_goes_with_the_lost_try(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1}\n{"ste')
    cut = cut_back(path, 2, without_step, start=START)
    assert (cut.num_cut, cut.damages) == (0, [])
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1}\n'


def test_two_lines_whose_end_between_them_is_gone_are_cut_apart(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 0}\n{"step": 1, "x": 1\0{"step": 2}\n')
    assert [line["step"] for line in read(path).lines] == [0, 2]
    assert cut_back(path, 2, without_step, start=START).num_cut == 1
    assert path.read_bytes() == b'{"step": 0}\n{"step": 1, "x": 1\0\n'


def test_a_full_disk_leaves_no_part_of_a_line_and_names_the_file(tmp_path):
    import resource

    path = tmp_path / "x.jsonl"
    append_lines(path, [{"step": 0}])
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            append_lines(path, [{"step": 1, "text": "more than five bytes"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before


def test_a_line_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    """Of a file that is new its name, too."""
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_ino), fsync(descriptor)))
    path = tmp_path / "x.jsonl"
    append_lines(path, [{"step": 0}])
    assert synced == [path.stat().st_ino, tmp_path.stat().st_ino]
    append_lines(path, [{"step": 1}])
    assert synced[2:] == [path.stat().st_ino]


def test_a_lone_surrogate_is_written_as_json_has_it(tmp_path):
    append_lines(tmp_path / "x.jsonl", [{"step": 0, "text": "\ud800"}])
    assert read(tmp_path / "x.jsonl").lines == [{"step": 0, "text": "\ud800"}]


def test_what_is_no_file_is_named_and_neither_waited_for_nor_read_without_end(tmp_path):
    path = tmp_path / "x.jsonl"
    assert read(path).lines == []
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero")):
        make()
        assert notes_of(path, read(path).damages) == [f"{path}: cannot be read (no ordinary file); left out"]
        for write in (lambda: append_lines(path, [{"step": 0}]), lambda: cut_back(path, 0, without_step)):
            with pytest.raises(OSError, match=r"no ordinary file|a link to a file of another name") as caught:
                write()
            assert caught.value.filename == str(path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_metrics_behind_a_damaged_line_are_read_and_it_is_named(tmp_path):
    writer = JsonlWriter(tmp_path, first_step=0)
    for step in range(4):
        writer.write(StepMetrics(step, {"loss": float(step)}))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9] + b"\0" * 9 + b"\n" + lines[2] + b'{"step": 3, "loss": "x"}\n')
    notes: list[str] = []
    assert [line["step"] for line in read_metrics(tmp_path, notes)] == [0, 2]
    assert [note.split(": ")[0] for note in notes] == [f"{path}:2", f"{path}:4"]
    resumed = JsonlWriter(tmp_path, first_step=3)
    assert [line["step"] for line in resumed.lines] == [0, 2]
    assert len(resumed.notes) == 1
    resumed.write(StepMetrics(3, {"loss": 3.0}))
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2, 3]
