"""Rows as verl, TRL, slime, NuminaMath and people write them."""

from __future__ import annotations

import pytest

from megatron_powerflow.data.prompt_rows import answer_of, lookalikes, prompt_of, task_of
from megatron_powerflow.errors import UserError

ASKED = [{"role": "user", "content": "What is 17 + 17?"}]
SOLVED = [*ASKED, {"role": "assistant", "content": "It is \\boxed{34}."}]


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "task"),
    [
        ({"prompt": "1 + 1 ="}, {"prompt": "1 + 1 ="}, None, None),
        ({"prompt": ASKED, "label": "34"}, {"messages": ASKED}, "34", None),
        ({"messages": ASKED, "answer": 34}, {"messages": ASKED}, "34", None),
        ({"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [1, 2]}, None, None),
        (
            {"data_source": "dapo", "prompt": ASKED, "reward_model": {"ground_truth": "34", "style": "rule"}},
            {"messages": ASKED},
            "34",
            "dapo",
        ),
        ({"question": "What is 17 + 17?", "answer": "17 + 17 is\n#### 34"}, {"messages": ASKED}, "34", None),
        ({"problem": " What is 17 + 17?\n", "expected_answer": "34"}, {"messages": ASKED}, "34", None),
        ({"input": "What is 17 + 17?", "ground_truth": "34", "task": "sum"}, {"messages": ASKED}, "34", "sum"),
        # NuminaMath-CoT: the question, its solution, and a conversation of both
        (
            {"source": "x", "problem": ASKED[0]["content"], "solution": SOLVED[1]["content"], "messages": SOLVED},
            {"messages": ASKED},
            "34",
            None,
        ),
        ({"problem": "p?", "answer": "1/2", "solution": "so \\boxed{\\frac12}"}, None, "1/2", None),
        ({"problem": "Prove it.", "solution": "As is easily seen."}, None, None, None),
    ],
)
def test_what_rows_hold(row, prompt, answer, task):
    if prompt is not None:
        assert prompt_of(row) == prompt
    assert (answer_of(row), task_of(row)) == (answer, task)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "exactly one of"),
        ({"answer": "1"}, "exactly one of"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "exactly one of"),
        ({"prompt": ASKED, "messages": ASKED}, "prompt and messages both hold a conversation"),
        ({"question": "a?", "problem": "b?"}, "question, problem all ask something"),
        ({"question": "a?", "prompt": "b"}, "prompt and question ask different things"),
        ({"problem": "a?", "messages": SOLVED}, "messages and problem ask different things"),
        ({"question": ""}, "exactly one of"),
        ({"question": " "}, "question must be a text that is not empty"),
        ({"question": 5}, "question must be a text"),
    ],
)
def test_a_row_that_asks_nothing_or_two_things_is_refused(row, words):
    row = {key: value for key, value in row.items() if value != ""}
    with pytest.raises(UserError, match=words):
        prompt_of(row)


@pytest.mark.parametrize(
    "row",
    [
        {"answer": "1", "label": "2"},
        {"answer": "1", "reward_model": {"ground_truth": "2"}},
        {"answer": "1", "solution": "\\boxed{2}"},
        {"answer": float("inf")},
        {"label": "nan"},
        {"label": [1]},
        {"solution": 5},
    ],
)
def test_two_answers_and_none_that_is_one_are_refused(row):
    with pytest.raises(UserError):
        answer_of(row)


@pytest.mark.parametrize(
    ("column", "meant"),
    [
        ("Answer", "answer"),
        ("PROMPT", "prompt"),
        ("prompts", "prompt"),
        ("expected answer", "expected_answer"),
        ("anwser", "answer"),
        ("mesages", "messages"),
        ("conversations", "messages"),
        ("gold_answer", "answer"),
        ("Question ", "question"),
    ],
)
def test_a_column_that_looks_like_a_known_one_is_named(column, meant):
    assert [*lookalikes({column: "x"})] == [(column, meant)]


@pytest.mark.parametrize("column", ["source", "level", "subject", "url", "extra_info", "ability", "x", "note", "hint"])
def test_other_columns_are_nobodys_business(column):
    assert not [*lookalikes({column: "x", "prompt": "y"})]
