"""Verbalized sampling: what is asked, and what is taken of answers that may hold anything."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.data import verbalized
from megatron_powerflow.data.verbalized import instruction, parse_verbalized, verbalized_row
from megatron_powerflow.errors import UserError

GOOD = {"responses": [{"text": "a rose", "probability": 0.25}, {"text": "a thorn", "probability": 0.01}]}


def pairs(answer: str, num_responses: int = 2):
    return [(r.text, r.probability) for r in parse_verbalized(answer, num_responses).responses]


def failures(answer: str, num_responses: int = 2) -> dict[str, int]:
    return dict(parse_verbalized(answer, num_responses).failures)


def items(*responses) -> str:
    return json.dumps({"responses": list(responses)})


def test_the_instruction_names_the_count_the_keys_and_the_length():
    text = instruction(5, 200)
    for part in ("Write 5 different responses", "about 200 words", '"responses"', '"text"', '"probability"', "only"):
        assert part in text
    assert "words" not in instruction(5, None)


def test_a_text_becomes_a_conversation_that_begins_with_the_instruction():
    row = verbalized_row({"prompt": "A poem.", "id": "p"}, 5, None)
    system, user = row["messages"]
    assert system == {"role": "system", "content": instruction(5, None)}
    assert user == {"role": "user", "content": "A poem."}


def test_a_conversation_keeps_its_system_message_and_its_turns():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go"},
    ]
    given_messages = [{"role": "system", "content": "You are terse."}, *turns]
    messages = verbalized_row({"messages": given_messages}, 3, 50)["messages"]
    assert messages[0]["content"] == "You are terse.\n\n" + instruction(3, 50)
    assert messages[1:] == turns
    assert given_messages[0]["content"] == "You are terse."  # the row itself is left as it was
    assert verbalized_row({"messages": turns}, 3, 50)["messages"][1:] == turns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_token_ids": [1, 2]}, "no conversation"),
        ({"prompt": " "}, "not empty"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "exactly one of"),
        ({"answer": "4"}, "exactly one of"),
    ],
)
def test_rows_that_are_no_conversation_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        verbalized_row(row, 5, None)


@pytest.mark.parametrize(
    "answer",
    [
        json.dumps(GOOD),
        f"\n  {json.dumps(GOOD, indent=2)}\n",
        f"```json\n{json.dumps(GOOD)}\n```",
        f"```\n{json.dumps(GOOD, indent=4)}\n```\n",
    ],
)
def test_a_json_object_is_read_bare_or_in_one_fence(answer):
    assert pairs(answer) == [("a rose", 0.25), ("a thorn", 0.01)]
    assert failures(answer) == {}


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Here are two poems.",
        json.dumps(GOOD)[:-1],  # cut at the length limit
        "Sure! " + json.dumps(GOOD),
        json.dumps(GOOD) + " Enjoy!",
        json.dumps(GOOD) * 2,
        json.dumps(GOOD).replace("}]", "},]"),
        str(GOOD),  # Python, not JSON
        "```json\n" + json.dumps(GOOD),
        json.dumps([GOOD]),
        '"responses"',
        "null",
        "[" * 200_000,
        '{"responses": ' * 50_000,
        json.dumps(GOOD).replace("0.25", "NaN"),
        json.dumps(GOOD).replace("0.25", "-Infinity"),
        json.dumps(GOOD).replace("0.25", "9" * 5000),
        '{"responses": [], "responses": [{"text": "a", "probability": 0.5}]}',
        '{"responses": [{"text": "a", "text": "b", "probability": 0.5}]}',
        "__import__('os').system('true')",
    ],
    ids=lambda answer: answer[:24],
)
def test_what_is_no_json_object_is_counted_and_not_repaired(answer):
    assert pairs(answer) == []
    assert failures(answer) == {verbalized.NOT_JSON: 2}


@pytest.mark.parametrize(
    "answer",
    [
        "{}",
        '{"response": []}',
        '{"responses": null}',
        '{"responses": {"text": "a", "probability": 0.5}}',
        '{"responses": "a"}',
        '{"responses": [], "note": "none"}',
        '{"Responses": [{"text": "a", "probability": 0.5}]}',
    ],
)
def test_an_object_without_the_list_is_counted(answer):
    assert pairs(answer) == []
    assert failures(answer) == {verbalized.NO_LIST: 2}


@pytest.mark.parametrize(
    "bad",
    [
        "a",
        7,
        None,
        [{"text": "a", "probability": 0.5}],
        {"probability": 0.5},
        {"text": None, "probability": 0.5},
        {"text": {"text": {"text": ["deep"]}}, "probability": 0.5},
        {"text": " \n", "probability": 0.5},
        {"text": "half \ud83d", "probability": 0.5},
        {"response": "a", "probability": 0.5},
    ],
)
def test_a_response_without_a_text_is_left_out_and_the_others_kept(bad):
    answer = items(bad, {"text": "kept", "probability": 0.5})
    assert pairs(answer) == [("kept", 0.5)]
    assert failures(answer) == {verbalized.BAD_TEXT: 1}


@pytest.mark.parametrize("bad", [-0.01, 1.01, 25, True, "0.5", "50%", None, [0.5], 10**400])
def test_a_probability_that_is_none_is_left_out(bad):
    answer = items({"text": "a", "probability": bad}, {"text": "kept", "probability": 1})
    assert pairs(answer) == [("kept", 1.0)]
    assert failures(answer) == {verbalized.BAD_PROBABILITY: 1}
    assert pairs(items({"text": "a"})) == []


def test_a_number_too_large_for_a_float_is_no_probability():
    answer = '{"responses": [{"text": "a", "probability": 1e999}, {"text": "b", "probability": 0}]}'
    assert pairs(answer) == [("b", 0.0)]
    assert failures(answer) == {verbalized.BAD_PROBABILITY: 1}


def test_more_and_fewer_than_asked_for_are_counted():
    many = items(*({"text": f"t{i}", "probability": 0.1} for i in range(5)))
    assert pairs(many, 2) == [("t0", 0.1), ("t1", 0.1)]
    assert failures(many, 2) == {verbalized.SURPLUS: 3}
    assert failures(many, 7) == {verbalized.MISSING: 2}
    assert failures(items(), 2) == {verbalized.MISSING: 2}


def test_an_answer_of_a_million_characters_is_not_parsed():
    padded = json.dumps(GOOD) + " " * verbalized.MAX_CHARACTERS
    assert failures(padded) == {verbalized.TOO_LONG: 2}


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.sampled_from(["responses", "text", "probability", "x"]), inner)
        ),
    )
)
def test_nothing_that_is_json_gets_through_ill_formed(value):
    for answer in (json.dumps(value), json.dumps({"responses": [value]})):
        found = parse_verbalized(answer, 3)
        assert len(found.responses) <= 3
        for response in found.responses:
            assert response.text == response.text.strip() != ""
            response.text.encode("utf-8")
            assert 0 <= response.probability <= 1


@given(st.text())
def test_no_text_raises(answer):
    found = parse_verbalized(answer, 3)
    assert len(found.responses) + sum(found.failures.values()) >= 3
