"""responses.jsonl survives being cut anywhere, and never mixes two evaluations."""

from __future__ import annotations

import json

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.responses import (
    append_responses,
    by_question,
    check_settings,
    open_responses,
    read_responses,
)

KEYS = [("math", f"q{i}") for i in range(5)]
SETTINGS = {"model": "m", "num_responses": 2, "seed": 0}
LINES = [
    {"id": identity, "task": task, "response_index": r, "text": f"ünï\n{identity}{r}"}
    for task, identity in KEYS
    for r in (0, 1)
]


def test_a_file_cut_anywhere_continues_behind_its_last_whole_round(tmp_path):
    """Rounds of 2 questions; the last one is a single question."""
    assert open_responses(tmp_path, SETTINGS, KEYS, 2, per_round=2) == 0
    append_responses(tmp_path, LINES)
    path = tmp_path / "responses.jsonl"
    whole = path.read_bytes()
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == ord("\n"))]
    for size in [*range(0, len(whole), 7), len(whole)]:
        path.write_bytes(whole[:size])
        num_done = open_responses(tmp_path, SETTINGS, KEYS, 2, per_round=2)
        num_whole = sum(end <= size for end in ends) - 1
        assert num_done == (5 if size == len(whole) else num_whole // 4 * 2)
        assert path.read_bytes() == whole[: ends[2 * num_done]]
        append_responses(tmp_path, LINES[2 * num_done :])
        assert path.read_bytes() == whole
    assert read_responses(tmp_path) == LINES
    assert list(by_question(LINES)) == KEYS
    assert [line["response_index"] for line in by_question(LINES)["math", "q3"]] == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "q0", "task": "math", "response_index": 1}\n',
        '{"id": "q1", "task": "math", "response_index": 0}\n',
        "not json\n",
        "[1]\n",
        "[" * 100_000 + "\n",
        "".join(json.dumps(line) + "\n" for line in [*LINES, LINES[0]]),
    ],
)
def test_lines_of_another_evaluation_are_refused_and_kept(tmp_path, text):
    path = tmp_path / "responses.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"responses.jsonl:\d+: not the response that belongs here"):
        open_responses(tmp_path, SETTINGS, KEYS, 2, per_round=1)
    assert path.read_text() == text


def test_other_settings_are_refused_one_by_one(tmp_path):
    out = tmp_path / "out"
    check_settings(out, SETTINGS)  # nothing there
    open_responses(out, SETTINGS, KEYS, 2, per_round=1)
    check_settings(out, SETTINGS)
    check_settings(out, {**SETTINGS, "num_responses": 4})  # nothing is answered yet
    (out / "responses.jsonl").write_text("a line\n")
    with pytest.raises(UserError) as caught:
        check_settings(out, {**SETTINGS, "num_responses": 4, "new": 1})
    assert caught.value.violations == (
        f"{out}: num_responses was 2 there and is 4 now",
        f"{out}: new was None there and is 1 now",
        f"{out}: holds another evaluation; choose another --out, or remove the folder",
    )
    for broken in ("{", "[]", "[" * 100_000):
        (out / "settings.json").write_text(broken)
        with pytest.raises(UserError, match="cannot be read"):
            check_settings(out, SETTINGS)


def test_folders_that_are_something_else_are_refused(tmp_path):
    (tmp_path / "responses.jsonl").write_text("mine\n")
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="no evaluation of ours"):
            check_settings(out, SETTINGS)
    assert (tmp_path / "responses.jsonl").read_text() == "mine\n"
    for name in ("evaluation.json", "judgements.jsonl"):
        (tmp_path / name[:4]).mkdir()
        (tmp_path / name[:4] / name).write_text("mine")
        with pytest.raises(UserError, match="no evaluation of ours"):
            check_settings(tmp_path / name[:4], SETTINGS)
