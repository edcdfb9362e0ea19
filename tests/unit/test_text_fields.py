"""Answers as files have them: what pandas, JSON and parquet leave where people wrote a number, or nothing."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest

from megatron_powerflow.data.prompts import load_prompts
from megatron_powerflow.data.text_fields import text_of
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.questions import load_questions


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((None, None), (float("nan"), None), ("", None), ("  \n", None), (Decimal("NaN"), None)),
        *((5, "5"), (5.0, "5"), (-0.0, "0"), (0.1, "0.1"), (1e-05, "0.00001"), (2.5e6, "2500000"), (" 7 ", "7")),
        *(
            (10**30, "1" + "0" * 30),
            (Decimal("5.00"), "5"),
            (Decimal("1E+2"), "100"),
            (1e-60, "1e-60"),
            ("None", "None"),
        ),
    ],
)
def test_what_a_field_says(value, text):
    assert text_of(value, "answer") == text


@pytest.mark.parametrize(
    ("value", "message"),
    [
        *(
            (float("inf"), "finite"),
            (float("-inf"), "finite"),
            (Decimal("Infinity"), "finite"),
            (2.0**53, "give it as a text"),
        ),
        *(
            (True, "text or a number"),
            ([5], "text or a number"),
            ({"a": 1}, "text or a number"),
            (b"5", "text or a number"),
        ),
        *(("nan", "says that there is none"), ("NaN", "leave the field out"), ("<NA>", "null"), ("null", "null")),
    ],
)
def test_what_is_no_answer_is_refused(value, message):
    with pytest.raises(UserError, match=message):
        text_of(value, "answer")


def test_missing_answers_of_pandas_are_missing_and_infinity_is_refused_by_line(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(f'{{"prompt_token_ids": [5], "answer": {a}}}\n' for a in ("NaN", '""', "null", "5.0", "1e-05"))
    )
    options = {"vocab_size": 301, "max_prompt_tokens": 9, "too_long": "drop"}
    prompts = load_prompts(path, None, **options).prompts
    assert [prompt.answer for prompt in prompts] == [None, None, None, "5", "0.00001"]
    rest = ("", ', "answer": Infinity', ', "answer": "nan"')
    path.write_text("".join(f'{{"prompt_token_ids": [5]{answer}}}\n' for answer in rest))
    with pytest.raises(UserError) as refusal:
        load_prompts(path, None, **options)
    assert [message.split(": ")[0].rpartition(":")[2] for message in refusal.value.violations] == ["2", "3"]


def test_parquet_columns_of_floats_give_whole_numbers_and_missing_answers(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    answers = pyarrow.array([5.0, float("nan"), None, 0.5], pyarrow.float64())
    parquet.write_table(pyarrow.table({"prompt_token_ids": [[5]] * 4, "answer": answers}), path)
    prompts = load_prompts(path, None, vocab_size=301, max_prompt_tokens=9, too_long="drop").prompts
    assert [prompt.answer for prompt in prompts] == ["5", None, None, "0.5"]


def test_an_evaluation_reads_numbers_alike_and_refuses_a_benchmark_without_an_answer(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"question": "?", "answer": answer}) + "\n" for answer in (5.0, 1e-05)))
    assert [question.answer for question in load_questions([str(path)]).questions] == ["5", "0.00001"]
    path.write_text(
        "".join(json.dumps({"question": "?", "answer": answer}) + "\n" for answer in ("nan", float("nan"), " "))
    )
    with pytest.raises(UserError) as refusal:
        load_questions([str(path)])
    assert len(refusal.value.violations) == 3
    path.write_text(json.dumps({"prompt": "?", "answer": float("nan")}) + "\n")
    assert load_questions([str(path)], format="prompts").questions[0].answer is None
