"""Every row of the tables in data/ANSWERS.md holds: the page that users read is the one that is tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_powerflow.data import answers
from megatron_powerflow.data.answers import cluster_answers, extract_answer, same_answer

PAGE = Path(answers.__file__).with_name("ANSWERS.md").read_text(encoding="utf-8")
ROWS = [
    re.findall(r"`([^`]*)`|(?<=\| )(yes|no|none)(?= \|)", line) for line in PAGE.splitlines() if line.startswith("| `")
]
ROWS = [[code or word for code, word in row] for row in ROWS]
PAIRS = [row for row in ROWS if len(row) == 3]
BOXES = [row for row in ROWS if len(row) == 2]


def test_the_page_has_the_rows_that_it_promises():
    assert len(PAIRS) >= 120
    assert len(BOXES) >= 25
    assert {verdict for *_, verdict in PAIRS} == {"yes", "no"}


@pytest.mark.parametrize(("one", "other", "verdict"), PAIRS, ids=[f"{a}  {b}" for a, b, _ in PAIRS])
def test_two_answers_are_the_same_or_not_in_either_order(one, other, verdict):
    assert same_answer(one, other) == same_answer(other, one) == (verdict == "yes")
    assert (cluster_answers([one, other]) == [0, 0]) == (verdict == "yes")


@pytest.mark.parametrize(("response", "answer"), BOXES, ids=[response for response, _ in BOXES])
def test_the_last_box_counts(response, answer):
    assert extract_answer(response) == (None if answer == "none" else answer)
