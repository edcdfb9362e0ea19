"""Which rows of a published file become prompts, and why do the others fall out?

NuminaMath-CoT and files like it have a question and a solution that ends in a box. A row falls out for the first of
these that holds (the paper filters "over-long responses and answer leakage" and gives no numbers; the limits are ours):

    no_question       no text to ask
    no_answer         no gold answer and no box in the solution: proofs, most of them
    many_answers      the solution boxes different answers
    long_answer       over MAX_ANSWER characters: a sentence, a proof, a table
    long_solution     over so many characters: what answers it would not fit a response
    answer_in_prompt  the question boxes or states its answer
    leaked            the question stands in an evaluation set
    duplicate         the question has been there before

Train and held-out part are told apart by the question's content, so that a row falls on the same side in every file.

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
    """Judges rows one after the other. against: the evaluation sets' questions."""

    against: Overlap
    max_answer: int = MAX_ANSWER
    max_solution: int = MAX_SOLUTION
    seen: set[bytes] = field(default_factory=set)

    def judge(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """("kept", "") or (a reason of REASONS, what exactly)."""
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

    def prepared(self, row: Mapping[str, Any]) -> dict[str, str]:
        """What a kept row becomes."""
        question, answer = _question(row), answer_of(row)
        assert answer is not None, "`judge` keeps no row without an answer"
        found = {"id": content_key(question).hex(), "task": "reasoning", "question": question, "answer": answer}
        source = row.get("source")
        return found | ({"source": source} if isinstance(source, str) else {})


def judge_question(question: str, against: Overlap, seen: set[bytes]) -> tuple[str, str]:
    """The last of the reasons: "leaked", "duplicate" or "kept", and then it is added to `seen`."""
    if (name := against.with_which(question)) is not None:
        return "leaked", name
    key = content_key(question)
    if key in seen:
        return "duplicate", ""
    seen.add(key)
    return "kept", ""


def content_key(question: str) -> bytes:
    """16 bytes that name a question by its words."""
    return hashlib.sha256(" ".join(words_of(question)).encode()).digest()[:16]


def is_held_out(question: str, share: float) -> bool:
    """Of the questions, about `share`: by the content alone."""
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
