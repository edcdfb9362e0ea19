"""Which prompts come next? A file of prompts, checked whole, and a resumable cursor over it.

`rows.py` reads the files, `prompt_rows.py` the rows. Every bad line is reported, with its number, before anything
starts. The order is a permutation per epoch that follows from (seed, epoch), so that the cursor is one whole number.

Left out: data-parallel shares (`Plan.share_of`), fetching files from the hub (`hub/fetch.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_powerflow.data.conversation import conversation_violation
from megatron_powerflow.data.prompt_format import PromptFormat
from megatron_powerflow.data.prompt_rows import answer_of, lookalikes, prompt_of, task_of
from megatron_powerflow.data.rows import read_file
from megatron_powerflow.data.text_fields import text_of
from megatron_powerflow.data.tokenizer import Tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.random_streams import generator
from megatron_powerflow.records import Prompt, Purpose

MAX_REPORTED = 20
AS_GIVEN = PromptFormat()
Rewrite = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class LoadedPrompts:
    """Holds the prompts of one prompts file or several.

    prompts: those within the length limit, in file order. num_too_long: how many were dropped for their length.
    """

    prompts: tuple[Prompt, ...]
    num_too_long: int


def load_prompts(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_prompt_tokens: int,
    too_long: str,
    rewrite: Rewrite | None = None,
    form: PromptFormat = AS_GIVEN,
    tasks: Sequence[str] | None = None,
    require_answer: bool = False,
) -> LoadedPrompts:
    """Reads and tokenizes one prompts file or several, in their order. Raises UserError that lists the bad lines.

    too_long: "drop" counts and skips prompts over max_prompt_tokens; "error" refuses them by line.
    rewrite: returns the row that is tokenized instead; its UserError is reported with the line.
    form: how prompts are written. tasks: only prompts of these tasks are taken; None takes all. require_answer: a
    prompt without a gold answer is refused.
    """
    reading = _RowReader(tokenizer, vocab_size, rewrite, form)
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    prompts: list[Prompt] = []
    violations: list[str] = []
    num_too_long = num_rows = 0
    for path in files:
        before = num_rows
        for number, row in read_file(path, violations):
            num_rows = before + number
            location = f"{path}:{number}"
            violations += reading.lookalikes(row, location)
            try:
                prompt = reading.prompt(row, num_rows - 1, location)
            except UserError as error:
                violations.append(f"{location}: {error}")
                continue
            if tasks is not None and prompt.task not in tasks:
                continue
            if require_answer and prompt.answer is None:
                violations.append(
                    f"{location}: has no gold answer (answer, solution, ...), and prompts.require_answer=true"
                )
            if len(prompt.token_ids) <= max_prompt_tokens:
                prompts.append(prompt)
                continue
            num_too_long += 1
            if too_long == "error":
                violations.append(
                    f"{location}: {len(prompt.token_ids)} tokens, over rollout.max_prompt_tokens={max_prompt_tokens}; "
                    "shorten it, raise the limit, or set prompts.too_long=drop"
                )
    if not prompts and not violations:
        violations.append(
            f"{', '.join(map(str, files))}: {_why_none(num_rows, num_too_long, max_prompt_tokens, tasks)}"
        )
    if violations:
        raise UserError(first_violations(violations))
    return LoadedPrompts(tuple(prompts), num_too_long)


def _why_none(num_rows: int, num_too_long: int, max_prompt_tokens: int, tasks: Sequence[str] | None) -> str:
    if num_too_long:
        return f"all {num_too_long} prompts are over rollout.max_prompt_tokens={max_prompt_tokens}"
    return f"no prompt is of prompts.tasks={list(tasks)}" if num_rows and tasks is not None else "no prompts in it"


class _RowReader:
    """Turns rows into prompts, and remembers the ids and columns that it has met."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, rewrite: Rewrite | None, form: PromptFormat) -> None:
        self._tokenizer, self._vocab_size, self._rewrite, self._form = tokenizer, vocab_size, rewrite, form
        self._location_of: dict[str, str] = {}
        self._columns: set[str] = set()

    def prompt(self, row: dict[str, Any], index: int, location: str) -> Prompt:
        """Returns the prompt of a row. Raises UserError without the row's location."""
        written_row = self._rewrite(row) if self._rewrite else row
        token_ids = prompt_token_ids(written_row, self._tokenizer, self._vocab_size, self._form)
        identity = text_field(row, "id") or str(index)
        first = self._location_of.setdefault(identity, location)
        if first != location:
            raise UserError(f"id {identity!r} is that of {first} too; ids are unique")
        return Prompt(identity, index, tuple(token_ids), answer_of(row), task_of(row), readable_text(row))

    def lookalikes(self, row: dict[str, Any], location: str) -> list[str]:
        """Returns messages on columns that look like others, one for each column of the files."""
        new = [(name, meant) for name, meant in lookalikes(row) if name not in self._columns]
        self._columns.update(name for name, _ in new)
        return [f"{location}: column {name!r} is not read; call it {meant}, or take it out" for name, meant in new]


def first_violations(violations: Sequence[str]) -> list[str]:
    """Returns the first MAX_REPORTED violations, and a line that says how many more there are."""
    more = len(violations) - MAX_REPORTED
    return [*violations[:MAX_REPORTED], *([f"... and {more} more like these"] if more > 0 else [])]


def prompt_token_ids(
    row: dict[str, Any], tokenizer: Tokenizer, vocab_size: int, form: PromptFormat = AS_GIVEN
) -> list[int]:
    """Returns the token ids of one row's prompt, whichever way it is given. Raises UserError without the location."""
    prompt = form.apply(_checked_prompt(prompt_of(row)))
    ((kind, value),) = prompt.items()
    if kind == "prompt_token_ids":
        return check_token_ids(value, vocab_size, kind)
    token_ids = tokenizer.encode(value) if kind == "prompt" else tokenizer.encode_chat(value)
    return check_token_ids(token_ids, vocab_size, f"{kind} (tokenized)")


def _checked_prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    """Returns the prompt. Raises UserError for a text that is empty, and for a conversation that needs no answer."""
    if "prompt" in prompt and (not isinstance(prompt["prompt"], str) or not prompt["prompt"].strip()):
        raise UserError(f"prompt must be a text that is not empty, got {prompt['prompt']!r:.60}")
    if "messages" in prompt:
        _check_messages(prompt["messages"])
    return prompt


def as_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """Returns one row's prompt as a conversation: its messages, or its text as the user's.

    Raises UserError, without the location, also for token ids.
    """
    prompt = _checked_prompt(prompt_of(row))
    if "prompt_token_ids" in prompt:
        raise UserError("prompt_token_ids are no conversation; give prompt or messages")
    return PromptFormat("chat").apply(prompt)["messages"]


def readable_text(row: dict[str, Any]) -> str:
    """Returns the text of a prompt that `prompt_token_ids` accepted, for people: its last message, or its text."""
    prompt = prompt_of(row)
    return prompt["messages"][-1]["content"] if "messages" in prompt else prompt.get("prompt", "")


def check_token_ids(value: Any, vocab_size: int, name: str) -> list[int]:
    """Returns `value`. Raises UserError unless it is a list of whole numbers in the vocabulary that is not empty."""
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise UserError(f"{name} must be a list of whole numbers that is not empty, got {value!r:.60}")
    outside = [token for token in value if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"{name} holds {outside[0]}, outside the model's vocabulary of {vocab_size}")
    return value


def _check_messages(value: Any) -> None:
    fine = (
        isinstance(value, list)
        and value
        and all(
            isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
            for item in value
        )
    )
    if not fine:
        raise UserError(f'messages must be a list of {{"role": ..., "content": ...}}, got {value!r:.80}')
    if wrong := conversation_violation(value):
        raise UserError(wrong)


def text_field(row: dict[str, Any], name: str) -> str | None:
    """Returns an optional text or number of a row, as text. Raises UserError without the location."""
    return text_of(row.get(name), name)


class PromptStream:
    """Walks over prompts without end, and resumes from `position`, which is all its state.

    Epoch e visits every prompt once, in the order permutation(seed, e); a step may span two epochs.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool, position: int = 0) -> None:
        assert prompts, "an empty prompts file is refused before"
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self.position = position

    def take(self, count: int) -> list[Prompt]:
        """Returns the next `count` prompts and moves the cursor."""
        taken = [self._at(self.position + offset) for offset in range(count)]
        self.position += count
        return taken

    def coming(self, count: int, *, behind: int = 0) -> list[Prompt]:
        """Returns `count` prompts without moving the cursor: those behind the next `behind` ones."""
        return [self._at(self.position + behind + offset) for offset in range(count)]

    def _at(self, position: int) -> Prompt:
        epoch, index = divmod(position, len(self._prompts))
        return self._prompts[self._order(epoch)[index]]

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        if getattr(self, "_cached_epoch", None) != epoch:
            numbers = generator(Purpose.PROMPT_ORDER, seed=self._seed, index=epoch)
            self._cached_epoch, self._cached_order = epoch, numbers.permutation(len(self._prompts))
        return self._cached_order
