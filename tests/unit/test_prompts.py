"""Prompt files: every form is read, every bad line is named, the walk over them can be resumed."""

from __future__ import annotations

import json

import pytest

from megatron_powerflow.data.prompts import MAX_REPORTED, PromptStream, load_prompts
from megatron_powerflow.data.tokenizer import load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt
from tests.tiny_models import write_tokenizer

VOCAB = 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, VOCAB)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w9{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


def load(path, tokenizer, **changes):
    arguments = {"vocab_size": VOCAB, "max_prompt_tokens": 8, "too_long": "drop"} | changes
    return load_prompts(path, tokenizer, **arguments)


def write(tmp_path, *rows) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_text_messages_and_token_ids_are_read(tokenizer, tmp_path):
    path = write(
        tmp_path,
        {"prompt": "w5 w6", "id": "a", "answer": 7, "task": "reasoning"},
        {"messages": [{"role": "user", "content": "w7"}]},
        "",
        {"prompt_token_ids": [4, 5]},
    )
    prompts = load(path, tokenizer).prompts
    assert [prompt.token_ids for prompt in prompts] == [(5, 6), (1, 7, 9), (4, 5)]
    assert [prompt.id for prompt in prompts] == ["a", "1", "3"]
    assert (prompts[0].answer, prompts[0].task, prompts[0].text) == ("7", "reasoning", "w5 w6")


def test_parquet_is_read(tokenizer, tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "prompts.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["w5 w6", "w7"], "answer": ["1", None]}), path)
    prompts = load(path, tokenizer).prompts
    assert [(prompt.token_ids, prompt.answer) for prompt in prompts] == [((5, 6), "1"), ((7,), None)]
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="not a parquet file"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", "not a line of JSON"),
        ("[1, 2]", "must be a JSON object, got list"),
        ('"text"', "got str"),
        ({"prompt": "w5", "messages": []}, "exactly one of"),
        ({"asked": "w5"}, "exactly one of prompt, messages, prompt_token_ids, question, problem, input; got ['asked']"),
        ({"prompt": ""}, "not empty"),
        ({"prompt": 5}, "must be a text"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, "messages must be a list"),
        ({"prompt_token_ids": [1, "2"]}, "whole numbers"),
        ({"prompt_token_ids": [True, 2]}, "whole numbers"),
        ({"prompt_token_ids": []}, "not empty"),
        ({"prompt_token_ids": [1, VOCAB]}, f"holds {VOCAB}, outside the model's vocabulary of {VOCAB}"),
        ({"prompt_token_ids": [-1]}, "holds -1"),
        ({"prompt": "w5", "answer": [1]}, "answer must be a text or a number"),
        ({"prompt": "w6", "id": "0"}, "prompts.jsonl:1 too; ids are unique"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tokenizer, tmp_path, row, words):
    path = write(tmp_path, {"prompt": "w5"}, row)
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    (violation,) = caught.value.violations
    assert f"{path}:2:" in violation
    assert words in violation


USER, ANSWER, SYSTEM = (
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w6"},
    {"role": "system", "content": "w7"},
)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [USER, ANSWER],
            "the last of messages is the assistant's: the prompt would hold its answer. Drop that message",
        ),
        ([SYSTEM, USER, ANSWER, USER, ANSWER], "set `answer` to the final answer"),
        ([ANSWER], "no turn of the user"),
        ([SYSTEM], "no turn of the user"),
        ([SYSTEM, ANSWER], "no turn of the user"),
        ([USER, SYSTEM], "message 2 of messages is the system's; there may be one, and it comes first"),
        ([SYSTEM, SYSTEM, USER], "message 2 of messages is the system's"),
        ([{"role": "user", "content": ""}], "message 1 of messages, the user's, is empty"),
        ([{"role": "system", "content": " \n"}, USER], "message 1 of messages, the system's, is empty"),
        ([USER, {"role": "assistant", "content": ""}], "the assistant's, is empty"),
        ([{"role": "human", "content": "w5"}], "role 'human'; known are system, user, assistant; call it user"),
        ([{"role": "gpt", "content": "w5"}], "call it assistant"),
        ([{"role": "", "content": "w5"}], "has role ''"),
        ([{"role": "tool", "content": "w5"}, USER], "message 1 of messages has role 'tool'"),
        ([USER, ANSWER | {"tool_calls": [{"x": 1}]}, USER], "calls tools"),
    ],
)
def test_a_conversation_that_does_not_wait_for_an_answer_is_refused(tokenizer, tmp_path, messages, words):
    """Its template would write it all the same: a prompt that holds its own answer, or that asks nothing."""
    path = write(tmp_path, {"prompt": "w5"}, {"messages": messages})
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    (violation,) = caught.value.violations
    assert violation.startswith(f"{path}:2: ")
    assert words in violation


@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, ANSWER, USER], [ANSWER, USER], [USER, USER]])
def test_a_conversation_that_ends_with_the_user_is_a_prompt(tokenizer, tmp_path, messages):
    expected = [token for m in messages for token in (1, int(m["content"].removeprefix("w")))]
    (prompt,) = load(write(tmp_path, {"messages": messages}), tokenizer, max_prompt_tokens=20).prompts
    assert prompt.token_ids == (*expected, 9)


def test_deeply_nested_and_undecodable_lines_do_no_harm(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "w5"}\n' + b"[" * 100_000 + b"\n" + b'\xff\xfe"\n')
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    assert len(caught.value.violations) == 2


def test_all_bad_lines_are_reported_up_to_a_limit(tokenizer, tmp_path):
    path = write(tmp_path, *["{"] * 50)
    with pytest.raises(UserError) as caught:
        load(path, tokenizer)
    assert len(caught.value.violations) == MAX_REPORTED + 1
    assert "30 more" in caught.value.violations[-1]


def test_long_prompts_are_dropped_and_counted_or_refused(tokenizer, tmp_path):
    path = write(tmp_path, {"prompt": "w5"}, {"prompt": "w5 " * 9})
    found = load(path, tokenizer)
    assert (len(found.prompts), found.num_too_long) == (1, 1)
    with pytest.raises(UserError, match=r":2: 9 tokens, over rollout.max_prompt_tokens=8"):
        load(path, tokenizer, too_long="error")
    path = write(tmp_path, {"prompt": "w5 " * 9})
    with pytest.raises(UserError, match="all 1 prompts are over"):
        load(path, tokenizer)


def test_files_that_are_not_there_or_empty(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(UserError, match="no prompts in it"):
        load(write(tmp_path, ""), tokenizer)


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(str(i), i, (i,)) for i in range(count)]


def test_each_epoch_visits_every_prompt_once_in_another_order():
    stream = PromptStream(prompts_of(10), seed=1, shuffle=True)
    epochs = [[prompt.id for prompt in stream.take(10)] for _ in range(3)]
    assert all(sorted(epoch, key=int) == [str(i) for i in range(10)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_walk_continues_from_a_position_across_epochs():
    whole = PromptStream(prompts_of(7), seed=3, shuffle=True)
    everything = [prompt.id for _ in range(6) for prompt in whole.take(4)]
    first = PromptStream(prompts_of(7), seed=3, shuffle=True)
    start = [prompt.id for _ in range(2) for prompt in first.take(4)]
    second = PromptStream(prompts_of(7), seed=3, shuffle=True, position=first.position)
    rest = [prompt.id for _ in range(4) for prompt in second.take(4)]
    assert start + rest == everything


def test_the_order_depends_on_the_seed_and_can_be_that_of_the_file():
    one, two = (PromptStream(prompts_of(20), seed=seed, shuffle=True).take(20) for seed in (1, 2))
    assert one != two
    assert PromptStream(prompts_of(4), seed=1, shuffle=False).take(6) == [*prompts_of(4), *prompts_of(2)]


def test_a_step_may_take_more_than_there_is():
    stream = PromptStream(prompts_of(2), seed=0, shuffle=True)
    assert sorted(prompt.id for prompt in stream.take(6)) == ["0"] * 3 + ["1"] * 3


def test_the_shipped_prompts_are_sound():
    from pathlib import Path

    path = Path(__file__).parents[2] / "examples" / "prompts" / "mixed.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 200
    assert len({row["id"] for row in rows}) == len({row["messages"][0]["content"] for row in rows}) == len(rows)
    tasks = {task: [row for row in rows if row["task"] == task] for task in ("reasoning", "creative")}
    assert sum(map(len, tasks.values())) == len(rows)
    assert all("\\boxed{}" in row["messages"][0]["content"] and row["answer"] for row in tasks["reasoning"])
    assert all("boxed" not in row["messages"][0]["content"] and "answer" not in row for row in tasks["creative"])
