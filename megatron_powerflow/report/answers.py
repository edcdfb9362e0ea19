"""What did the policy answer to the same prompts, before and after? A few lines of samples.jsonl, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_powerflow.report.arms import Arm
from megatron_powerflow.report.reading import number, visible

MAX_PROMPTS = 3  # of an arm
MAX_CHARACTERS = 2000  # of an answer
MAX_QUESTION = 600


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer as it is shown. Example of when: "step 0, 118 tokens, cut at the limit"."""

    when: str
    text: str


@dataclass(frozen=True, slots=True)
class PromptAnswers:
    """A prompt with the answers of the first and the last sampled step; after is None where they are one step."""

    question: str
    gold: str
    before: Answer
    after: Answer | None


def answers_of(arm: Arm) -> list[PromptAnswers]:
    """Return shortened answers to the first prompts of the arm's first seed that has samples."""
    run = next((run for run in arm.members if run.samples), None)
    by_prompt: dict[str, list[Mapping[str, Any]]] = {}
    for line in run.samples if run else ():
        if number(line.get("step")) is not None and isinstance(line.get("response"), str):
            by_prompt.setdefault(visible(line.get("id", "?"), 200), []).append(line)
    return [_prompt_answers(lines) for lines in list(by_prompt.values())[:MAX_PROMPTS]]


def _prompt_answers(lines: Sequence[Mapping[str, Any]]) -> PromptAnswers:
    first, last = (pick(lines, key=lambda line: float(line["step"])) for pick in (min, max))
    gold = first.get("answer")
    return PromptAnswers(
        question=visible(first.get("question") or first.get("prompt") or "?", MAX_QUESTION),
        gold="" if gold is None else visible(gold, 200),
        before=_answer(first),
        after=_answer(last) if last["step"] != first["step"] else None,
    )


def _answer(line: Mapping[str, Any]) -> Answer:
    parts = [f"step {line['step']:.0f}"]
    tokens = number(line.get("num_response_tokens"))
    if tokens is not None:
        parts.append(f"{tokens:.0f} tokens")
    if line.get("finish_reason") == "length":
        parts.append("cut at the limit")
    return Answer(", ".join(parts), visible(line["response"], MAX_CHARACTERS))
