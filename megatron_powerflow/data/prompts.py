"""Which prompts come next? A file of prompts, checked whole, and a resumable cursor over it.

Files are read by `rows.py`, rows by `prompt_rows.py`. Every bad line is reported, with its number, before anything
starts. The order is a permutation per epoch, a function of (seed, epoch): the cursor is one whole number.

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
class PromptFile:
    """prompts: those within the limit, in file order; num_too_long: those dropped for their length."""

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
) -> PromptFile:
    """Read and tokenize one prompts file or several, in their order. Raises UserError listing the bad lines.

    too_long: "drop" counts and skips prompts over max_prompt_tokens; "error" refuses them by line.
    rewrite: what is tokenized instead of a row; its UserError is reported with the line.
    form: how prompts are written. tasks: only prompts of these. require_answer: refuse those without a gold answer.
    """
    reading = _Reading(tokenizer, vocab_size, rewrite, form)
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    prompts: list[Prompt] = []
    violations: list[str] = []
    num_too_long = num_rows = 0
    for path in files:
        before = num_rows
        for number, row in read_file(path, violations):
            num_rows = before + number
            place = f"{path}:{number}"
            violations += reading.lookalikes(row, place)
            try:
                prompt = reading.prompt(row, num_rows - 1, place)
            except UserError as error:
                violations.append(f"{place}: {error}")
                continue
            if tasks is not None and prompt.task not in tasks:
                continue
            if require_answer and prompt.answer is None:
                violations.append(
                    f"{place}: has no gold answer (answer, solution, ...), and prompts.require_answer=true"
                )
            if len(prompt.token_ids) <= max_prompt_tokens:
                prompts.append(prompt)
                continue
            num_too_long += 1
            if too_long == "error":
                violations.append(
                    f"{place}: {len(prompt.token_ids)} tokens, over rollout.max_prompt_tokens={max_prompt_tokens}; "
                    "shorten it, raise the limit, or set prompts.too_long=drop"
                )
    if not prompts and not violations:
        violations.append(
            f"{', '.join(map(str, files))}: {_why_none(num_rows, num_too_long, max_prompt_tokens, tasks)}"
        )
    if violations:
        raise UserError(first_violations(violations))
    return PromptFile(tuple(prompts), num_too_long)


def _why_none(num_rows: int, num_too_long: int, max_prompt_tokens: int, tasks: Sequence[str] | None) -> str:
    if num_too_long:
        return f"all {num_too_long} prompts are over rollout.max_prompt_tokens={max_prompt_tokens}"
    return f"no prompt is of prompts.tasks={list(tasks)}" if num_rows and tasks is not None else "no prompts in it"


class _Reading:
    """Rows into prompts; remembers which ids and columns it has seen."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, rewrite: Rewrite | None, form: PromptFormat) -> None:
        self._tokenizer, self._vocab_size, self._rewrite, self._form = tokenizer, vocab_size, rewrite, form
        self._place_of: dict[str, str] = {}
        self._columns: set[str] = set()

    def prompt(self, row: dict[str, Any], index: int, place: str) -> Prompt:
        """Raises UserError without the line."""
        asked = self._rewrite(row) if self._rewrite else row
        token_ids = prompt_token_ids(asked, self._tokenizer, self._vocab_size, self._form)
        identity = text_field(row, "id") or str(index)
        first = self._place_of.setdefault(identity, place)
        if first != place:
            raise UserError(f"id {identity!r} is that of {first} too; ids are unique")
        return Prompt(identity, index, tuple(token_ids), answer_of(row), task_of(row), readable(row))

    def lookalikes(self, row: dict[str, Any], place: str) -> list[str]:
        """Said once for each column."""
        new = [(name, meant) for name, meant in lookalikes(row) if name not in self._columns]
        self._columns.update(name for name, _ in new)
        return [f"{place}: column {name!r} is not read; call it {meant}, or take it out" for name, meant in new]


def first_violations(violations: Sequence[str]) -> list[str]:
    """As many as a person reads, and how many more there are."""
    more = len(violations) - MAX_REPORTED
    return [*violations[:MAX_REPORTED], *([f"... and {more} more like these"] if more > 0 else [])]


def prompt_token_ids(
    row: dict[str, Any], tokenizer: Tokenizer, vocab_size: int, form: PromptFormat = AS_GIVEN
) -> list[int]:
    """Token ids of one row's prompt, whichever way it is given. Raises UserError without the line number."""
    prompt = form.apply(_checked(prompt_of(row)))
    ((kind, value),) = prompt.items()
    if kind == "prompt_token_ids":
        return check_token_ids(value, vocab_size, kind)
    token_ids = tokenizer.encode(value) if kind == "prompt" else tokenizer.encode_chat(value)
    return check_token_ids(token_ids, vocab_size, f"{kind} (tokenized)")


def _checked(prompt: dict[str, Any]) -> dict[str, Any]:
    """Raises UserError for a text that is none, and for a conversation that waits for nothing."""
    if "prompt" in prompt and (not isinstance(prompt["prompt"], str) or not prompt["prompt"].strip()):
        raise UserError(f"prompt must be a text that is not empty, got {prompt['prompt']!r:.60}")
    if "messages" in prompt:
        _check_messages(prompt["messages"])
    return prompt


def as_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """One row's prompt as a conversation: its messages, or its text as the user's. Raises UserError like the above."""
    prompt = _checked(prompt_of(row))
    if "prompt_token_ids" in prompt:
        raise UserError("prompt_token_ids are no conversation; give prompt or messages")
    return PromptFormat("chat").apply(prompt)["messages"]


def readable(row: dict[str, Any]) -> str:
    """What a person would read of a prompt that `prompt_token_ids` accepted."""
    prompt = prompt_of(row)
    return prompt["messages"][-1]["content"] if "messages" in prompt else prompt.get("prompt", "")


def check_token_ids(value: Any, vocab_size: int, name: str) -> list[int]:
    """A non-empty list of whole numbers within the vocabulary, or a UserError that names it."""
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
    """An optional text or number of a row, as text. Raises UserError without the line number."""
    return text_of(row.get(name), name)


class PromptStream:
    """An endless, resumable walk over prompts: `position` is all its state.

    Epoch e visits every prompt once, in the order permutation(seed, e); a step may span two epochs.
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool, position: int = 0) -> None:
        assert prompts, "an empty prompts file is refused before"
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self.position = position

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; moves the cursor."""
        taken = [self._at(self.position + offset) for offset in range(count)]
        self.position += count
        return taken

    def _at(self, position: int) -> Prompt:
        epoch, place = divmod(position, len(self._prompts))
        return self._prompts[self._order(epoch)[place]]

    def _order(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self._prompts))
        if getattr(self, "_cached_epoch", None) != epoch:
            numbers = generator(Purpose.PROMPT_ORDER, seed=self._seed, index=epoch)
            self._cached_epoch, self._cached_order = epoch, numbers.permutation(len(self._prompts))
        return self._cached_order
