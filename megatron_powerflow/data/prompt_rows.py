"""Which prompt and which gold answer does a row hold? Rows as verl, TRL, slime, NuminaMath and people write them.

    prompt              a text, or a list of messages (verl, TRL)
    messages            [{"role", "content"}, ...]; NuminaMath's, which end in the solution beside a column of their own
    prompt_token_ids    whole numbers
    question, problem,  what is asked, without anything around it: the one message of the user
    input
    answer, expected_answer, final_answer, ground_truth, label, reward_model.ground_truth
                        the gold answer; the text behind #### where there is one (GSM8K)
    solution            a text; its last box is the answer
    task, data_source   which kind of question it is

A row whose columns contradict each other is refused. So is a column that looks like one of these and is not.

Left out: ids in and out (`prompts.py`), how a prompt is written for the model (`prompt_format.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_powerflow.data.answers import same_answer
from megatron_powerflow.data.boxes import last_boxed
from megatron_powerflow.data.text_fields import text_of
from megatron_powerflow.errors import UserError

PROMPT_COLUMNS = ("prompt", "messages", "prompt_token_ids")
QUESTION_COLUMNS = ("question", "problem", "input")
ANSWER_COLUMNS = ("answer", "expected_answer", "final_answer", "ground_truth", "label")
TASK_COLUMNS = ("task", "data_source")
READ_COLUMNS = frozenset(
    {*PROMPT_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS, *TASK_COLUMNS, "id", "solution", "reward_model"}
)
# Columns of published files that are known and not read.
IGNORED_COLUMNS = (
    *("source", "subject", "level", "url", "year", "unique_id", "ability", "extra_info", "index", "split", "tags"),
    *("type", "difficulty", "category", "instruction", "system", "context", "unit", "error", "labels"),
    *("answer_type", "problem_type", "question_type", "num_tokens", "metadata"),
)
ALIASES = {
    "conversation": "messages",
    "conversations": "messages",
    "chat": "messages",
    "text": "prompt",
    "query": "question",
    "gold": "answer",
    "gold_answer": "answer",
    "correct_answer": "answer",
    "target": "answer",
    "response": "answer",
}
LIKENESS = 0.82


def lookalikes(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields (column, the column that it looks like) for columns that are not read, though the user may expect it."""
    for name in row:
        if name in READ_COLUMNS or name in IGNORED_COLUMNS:
            continue
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        close = difflib.get_close_matches(plain, READ_COLUMNS, n=1, cutoff=LIKENESS)
        meant = plain if plain in READ_COLUMNS else ALIASES.get(plain) or (close[0] if close else None)
        if meant is not None and meant not in row:
            yield name, meant


def prompt_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"prompt": text}, {"messages": [...]} or {"prompt_token_ids": [...]}.

    Raises UserError, without the row's location, where the row has no prompt or more than one.
    """
    given = {name: row[name] for name in PROMPT_COLUMNS if row.get(name) is not None}
    asked = {name: row[name] for name in QUESTION_COLUMNS if row.get(name) is not None}
    if isinstance(given.get("prompt"), list):
        if "messages" in given:
            raise UserError("prompt and messages both hold a conversation; leave one of them")
        given = {"messages" if name == "prompt" else name: value for name, value in given.items()}
    if len(given) > 1 or not (given or asked):
        names = [*given, *asked]
        raise UserError(
            f"needs exactly one of {', '.join((*PROMPT_COLUMNS, *QUESTION_COLUMNS))}; got {names or sorted(row)[:8]}"
        )
    if not asked:
        return given
    (name, question), *others = asked.items()
    if others or not isinstance(question, str) or not question.strip():
        raise UserError(
            f"{', '.join(asked)} all ask something; leave one of them"
            if others
            else f"{name} must be a text that is not empty, got {question!r:.60}"
        )
    alone = {"messages": [{"role": "user", "content": question.strip()}]}
    if not given:
        return alone
    return _both(name, question.strip(), given)


def _both(name: str, question: str, given: dict[str, Any]) -> dict[str, Any]:
    """Returns the prompt of a row that holds its question twice, if both are the same. Raises UserError if not."""
    ((kind, value),) = given.items()
    if kind == "messages" and isinstance(value, list):
        texts = [item.get("content") for item in value if isinstance(item, dict) and item.get("role") == "user"]
        if texts and str(texts[-1]).strip() == question:
            answered = value[-1].get("role") == "assistant"
            return {"messages": value[:-1] if answered else value}
    if kind == "prompt" and isinstance(value, str) and question in value:
        return given
    raise UserError(f"{kind} and {name} ask different things; leave one of them")


def answer_of(row: Mapping[str, Any]) -> str | None:
    """Returns the gold answer; None where the row has none.

    Raises UserError, without the row's location, where two columns say different answers.
    """
    answer_by_column = {name: text for name in ANSWER_COLUMNS if (text := text_of(row.get(name), name)) is not None}
    reward_model = row.get("reward_model")
    if isinstance(reward_model, Mapping):
        name = "reward_model.ground_truth"
        if (text := text_of(reward_model.get("ground_truth"), name)) is not None:
            answer_by_column[name] = text
    answer_by_column = {name: _last_part(text) for name, text in answer_by_column.items()}
    if (solution := row.get("solution")) is not None:
        if not isinstance(solution, str):
            raise UserError(f"solution must be a text, got {solution!r:.60}")
        if (boxed := last_boxed(solution)) is not None:
            answer_by_column["solution"] = boxed
    if not answer_by_column:
        return None
    (first_name, first), *others = answer_by_column.items()
    for name, answer in others:
        if answer != first and not same_answer(answer, first):
            raise UserError(f"{first_name} says {first!r:.60} and {name} says {answer!r:.60}; leave the right one")
    return first


def task_of(row: Mapping[str, Any]) -> str | None:
    """Returns the kind of the question; None where the row says none."""
    return next((text for name in TASK_COLUMNS if (text := text_of(row.get(name), name)) is not None), None)


def _last_part(text: str) -> str:
    """Returns the text behind ####, which ends the working in GSM8K's answers; the whole text without one."""
    return text.rpartition("####")[2].strip() or text
