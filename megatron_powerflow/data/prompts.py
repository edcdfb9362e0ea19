"""Which prompts come next? A file of prompts, checked whole, and a resumable cursor over it.

JSONL or parquet, one prompt per line: one of `prompt` (text), `messages` (chat template applied) or
`prompt_token_ids`; optional `id`, `answer`, `task`. Every bad line is reported, with its number, before anything
starts. The order is a permutation per epoch, a function of (seed, epoch): the cursor is one whole number.

Left out: data-parallel shares (`train.py` slices), fetching data sets.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_powerflow.data.conversation import conversation_violation
from megatron_powerflow.data.text_fields import text_of
from megatron_powerflow.data.tokenizer import Tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.random_streams import generator
from megatron_powerflow.records import Prompt, Purpose

MAX_REPORTED = 20
KINDS = ("prompt", "messages", "prompt_token_ids")
Rewrite = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class PromptFile:
    """prompts: those within the limit, in file order; num_too_long: those dropped for their length."""

    prompts: tuple[Prompt, ...]
    num_too_long: int


def load_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    *,
    vocab_size: int,
    max_prompt_tokens: int,
    too_long: str,
    rewrite: Rewrite | None = None,
) -> PromptFile:
    """Read and tokenize a prompts file. Raises UserError listing the bad lines.

    too_long: "drop" counts and skips prompts over max_prompt_tokens; "error" refuses them by line.
    rewrite: what is tokenized instead of a row; its UserError is reported with the line.
    """
    path = Path(path)
    prompts: list[Prompt] = []
    violations: list[str] = []
    seen: dict[str, int] = {}
    num_too_long = 0
    for number, row in read_rows(path, violations):
        try:
            token_ids = prompt_token_ids(rewrite(row) if rewrite else row, tokenizer, vocab_size)
            identity = text_field(row, "id") or str(number - 1)
            answer, task = text_field(row, "answer"), text_field(row, "task")
        except UserError as error:
            violations.append(f"{path}:{number}: {error}")
            continue
        if identity in seen:
            violations.append(f"{path}:{number}: id {identity!r} is that of line {seen[identity]} too; ids are unique")
        seen[identity] = number
        if len(token_ids) > max_prompt_tokens:
            num_too_long += 1
            if too_long == "error":
                violations.append(
                    f"{path}:{number}: {len(token_ids)} tokens, over rollout.max_prompt_tokens={max_prompt_tokens}; "
                    "shorten it, raise the limit, or set prompts.too_long=drop"
                )
            continue
        prompts.append(Prompt(identity, number - 1, tuple(token_ids), answer, task, readable(row)))
    if not prompts and not violations:
        violations.append(
            f"{path}: all {num_too_long} prompts are over rollout.max_prompt_tokens={max_prompt_tokens}"
            if num_too_long
            else f"{path}: no prompts in it"
        )
    if violations:
        raise UserError(first_violations(violations))
    return PromptFile(tuple(prompts), num_too_long)


def first_violations(violations: Sequence[str]) -> list[str]:
    """As many as a person reads, and how many more there are."""
    more = len(violations) - MAX_REPORTED
    return [*violations[:MAX_REPORTED], *([f"... and {more} more like these"] if more > 0 else [])]


def read_rows(path: Path, violations: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(1-based line, JSON object) of a JSONL or parquet file; bad lines are added to `violations` and skipped."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a JSONL or parquet file")
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:  # ValueError: also numbers of over 4,300 digits
                violations.append(f"{path}:{number}: not a line of JSON: {error}")
                continue
            if b"\\u" in line and not is_unicode(row):
                violations.append(
                    f"{path}:{number}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
                )
                continue
            if not isinstance(row, dict):
                violations.append(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
                continue
            yield number, row


def is_unicode(row: Any) -> bool:
    """JSON can spell half a character, and no tokenizer or file can take it."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; pip install pyarrow, or convert to JSONL") from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: not a parquet file that can be read: {error}") from None
    for number, row in enumerate(rows, start=1):
        yield number, {key: value for key, value in row.items() if value is not None}


def prompt_token_ids(row: dict[str, Any], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Token ids of one row's prompt, whichever way it is given. Raises UserError without the line number."""
    kind = _prompt_kind(row)
    if kind == "prompt_token_ids":
        return check_token_ids(row[kind], vocab_size, kind)
    token_ids = tokenizer.encode(_prompt_text(row)) if kind == "prompt" else tokenizer.encode_chat(_messages(row))
    return check_token_ids(token_ids, vocab_size, f"{kind} (tokenized)")


def as_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """One row's prompt as a conversation: its messages, or its text as the user's. Raises UserError like the above."""
    kind = _prompt_kind(row)
    if kind == "prompt_token_ids":
        raise UserError("prompt_token_ids are no conversation; give prompt or messages")
    return [{"role": "user", "content": _prompt_text(row)}] if kind == "prompt" else list(_messages(row))


def _prompt_kind(row: dict[str, Any]) -> str:
    given = [kind for kind in KINDS if row.get(kind) is not None]
    if len(given) != 1:
        raise UserError(f"needs exactly one of {', '.join(KINDS)}; got {given or sorted(row)[:8]}")
    return given[0]


def _prompt_text(row: dict[str, Any]) -> str:
    value = row["prompt"]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"prompt must be a text that is not empty, got {value!r:.60}")
    return value


def readable(row: dict[str, Any]) -> str:
    """What a person would read of a prompt that `prompt_token_ids` accepted."""
    if row.get("messages") is not None:
        return row["messages"][-1]["content"]
    return row.get("prompt") or ""


def check_token_ids(value: Any, vocab_size: int, name: str) -> list[int]:
    """A non-empty list of whole numbers within the vocabulary, or a UserError that names it."""
    if not isinstance(value, list) or not value or not all(type(token) is int for token in value):
        raise UserError(f"{name} must be a list of whole numbers that is not empty, got {value!r:.60}")
    outside = [token for token in value if not 0 <= token < vocab_size]
    if outside:
        raise UserError(f"{name} holds {outside[0]}, outside the model's vocabulary of {vocab_size}")
    return value


def _messages(row: dict[str, Any]) -> Sequence[dict[str, str]]:
    value = row["messages"]
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
    return value


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
