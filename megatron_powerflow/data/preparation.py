"""Which rows of a published file become prompts, and why are the others left out?

NuminaMath-CoT and files like it have a question and a solution that ends in a box. A row is left out for the first of
these reasons that holds (the paper filters "over-long responses and answer leakage" and gives no numbers; the limits
are ours):

    no_question       no text to ask
    no_answer         no gold answer and no box in the solution: proofs, most of them
    many_answers      the solution boxes different answers
    long_answer       over MAX_ANSWER characters: a sentence, a proof, a table
    long_solution     over MAX_SOLUTION characters: a response to it would be too long
    answer_in_prompt  the question boxes or states its answer
    leaked            an evaluation set holds the question
    duplicate         an earlier row had the same question

The question's content decides whether a row is held out, so that the same row of any file falls on the same side.

Left out: poems, stories and jokes (`creative_preparation.py`); reading and writing files (`prepare.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_powerflow.data.answers import same_answer
from megatron_powerflow.data.boxes import all_boxed
from megatron_powerflow.data.overlap import Overlap, words_of
from megatron_powerflow.data.prompt_rows import answer_of, prompt_of
from megatron_powerflow.errors import UserError

MAX_ANSWER = 60
MAX_SOLUTION = 9_000  # characters: some 3,000 tokens, the recipes' longest response
REASONS = {
    "no_question": "no question in it",
    "no_text": "no poem, story or joke in it",
    "too_short": "nothing is left to write after its beginning",
    "no_answer": "no answer and no box in the solution (a proof, most often)",
    "many_answers": "the solution boxes different answers",
    "long_answer": "the answer is no short one",
    "long_solution": "the solution is longer than a response may be",
    "answer_in_prompt": "the question says its answer",
    "leaked": "the question is one of an evaluation set",
    "duplicate": "the question has been there before",
    "surplus": "more of its kind than --each asks for; which ones stay follows from their content",
    "unreadable": "a field that cannot be read",
}
_SAYS_ANSWER = re.compile(r"\\boxed|\bthe answer is\b|\banswer\s*[:=]", re.IGNORECASE)


@dataclass
class Preparation:
    """Judges rows one after the other.

    against: the evaluation sets' questions. seen: keys of the questions that were kept so far.
    """

    against: Overlap
    max_answer: int = MAX_ANSWER
    max_solution: int = MAX_SOLUTION
    seen: set[bytes] = field(default_factory=set)

    def judge(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Returns ("kept", "") or (a key of REASONS, a detail)."""
        try:
            question = _question(row)
            answer = answer_of(row)
        except UserError as error:
            return "unreadable", str(error)
        if not question:
            return "no_question", ""
        boxes = all_boxed(row["solution"]) if isinstance(row.get("solution"), str) else []
        solution = row.get("solution") or ""
        if not answer:
            return "no_answer", ""
        if any(not same_answer(box, boxes[-1]) for box in boxes[:-1]):
            return "many_answers", ", ".join(boxes)[:80]
        if len(answer) > self.max_answer or "\n" in answer:
            return "long_answer", answer[:80]
        if len(solution) > self.max_solution:
            return "long_solution", f"{len(solution)} characters"
        if _SAYS_ANSWER.search(question):
            return "answer_in_prompt", ""
        return judge_question(question, self.against, self.seen)

    def prepared_row(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Returns the prompt that a kept row becomes: id, task, question, answer and, where it has one, source."""
        question, answer = _question(row), answer_of(row)
        assert answer is not None, "`judge` keeps no row without an answer"
        prompt = {"id": content_key(question).hex(), "task": "reasoning", "question": question, "answer": answer}
        source = row.get("source")
        return prompt | ({"source": source} if isinstance(source, str) else {})


def judge_question(question: str, against: Overlap, seen: set[bytes]) -> tuple[str, str]:
    """Returns ("leaked", the other question's name), ("duplicate", "") or ("kept", "").

    The key of a kept question is added to `seen`.
    """
    if (name := against.overlapping_question(question)) is not None:
        return "leaked", name
    key = content_key(question)
    if key in seen:
        return "duplicate", ""
    seen.add(key)
    return "kept", ""


def content_key(question: str) -> bytes:
    """Returns 16 bytes that identify a question by its words."""
    return hashlib.sha256(" ".join(words_of(question)).encode()).digest()[:16]


def is_held_out(question: str, share: float) -> bool:
    """Whether the question is one of the share that is held out, in [0, 1]; its content alone decides."""
    return int.from_bytes(content_key(question)[:8]) < share * 2**64


def _question(row: Mapping[str, Any]) -> str:
    prompt = prompt_of(row)
    if "prompt_token_ids" in prompt:
        raise UserError("prompt_token_ids hold no question that can be read")
    if "prompt" in prompt:
        return str(prompt["prompt"]).strip()
    users = [message["content"] for message in prompt["messages"] if message.get("role") == "user"]
    if len(users) != 1:
        raise UserError(f"a conversation with {len(users)} turns of the user is no question")
    return str(users[0]).strip()
