"""Which responses are right, and which of them agree?

Equality of answers is `data/answers.py`; this file asks it no question twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_powerflow.data.answers import cluster_answers, same_answer


@dataclass(frozen=True, slots=True)
class Grade:
    """correct is None without a gold answer; cluster numbers equal answers of one question, None without an answer."""

    correct: bool | None
    cluster: int | None


def grade(answers: Sequence[str | None], gold: str | None, tolerance: float | None = None) -> list[Grade]:
    """Of the answers to one question, in their order."""
    return [
        Grade(correct, cluster)
        for correct, cluster in zip(verdicts(answers, gold, tolerance), clusters(answers), strict=True)
    ]


def verdicts(answers: Sequence[str | None], gold: str | None, tolerance: float | None = None) -> list[bool | None]:
    """Right or not; no answer is wrong; None where there is no gold answer. Answers spelt alike are compared once."""
    if gold is None:
        return [None] * len(answers)
    correct = {answer: is_correct(answer, gold, tolerance) for answer in set(answers) if answer is not None}
    return [correct.get(answer, False) for answer in answers]


def clusters(answers: Sequence[str | None]) -> list[int | None]:
    """Equal answers share a number, by first appearance; None without an answer. Spelt alike: compared once."""
    spelt = list(dict.fromkeys(answer for answer in answers if answer is not None))
    number = dict(zip(spelt, cluster_answers(spelt), strict=True))
    return [number.get(answer) for answer in answers]


def is_correct(answer: str, gold: str, tolerance: float | None) -> bool:
    """The gold answer, or a plain number within `tolerance` of it where both are plain numbers."""
    if same_answer(gold, answer):
        return True
    numbers = _decimal(gold), _decimal(answer)
    return tolerance is not None and None not in numbers and abs(numbers[0] - numbers[1]) <= Fraction(str(tolerance))


def _decimal(text: str) -> Fraction | None:
    text = text.strip().strip("$")
    try:
        return Fraction(text) if len(text) <= 40 and "e" not in text.lower() else None
    except (ValueError, ZeroDivisionError):
        return None
