"""What did the policy answer, before and after? samples.jsonl: a few prompts, answered again from time to time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILE_NAME = "samples.jsonl"


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Lines with step, id, question, prompt, response, answer, finish_reason, num_response_tokens."""
    path = folder / FILE_NAME
    if not path.is_file():
        return []
    # not splitlines(): it also splits at U+2028, U+0085 and the like, which an answer may hold
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_samples(folder: Path, step: int, lines: Sequence[dict[str, Any]]) -> None:
    """Add the answers before `step`; those of this step and later, from a lost try, are replaced."""
    kept = [line for line in read_samples(folder) if line["step"] < step]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*kept, *lines])
    partial = folder / (FILE_NAME + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(folder / FILE_NAME)
