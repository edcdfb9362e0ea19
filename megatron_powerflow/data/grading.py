"""Which responses are right, and which of them agree?

Each answer is read once. Whether it is right depends on its class and the gold answer alone.

Left out: what an answer says and when two agree (`answers.py`, `answer_reading.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_powerflow.data.answer_reading import Answer, read_answer
from megatron_powerflow.data.answers import agree, cluster_read


@dataclass(frozen=True, slots=True)
class Grade:
    """correct is None without a gold answer; cluster numbers equal answers of one question, None without an answer."""

    correct: bool | None
    cluster: int | None


def grade(answers: Sequence[str | None], gold: str | None, tolerance: float | None = None) -> list[Grade]:
    """Of the answers to one question, in their order."""
    read = _read_all(answers)
    return [
        Grade(correct, cluster)
        for correct, cluster in zip(_verdicts(read, gold, tolerance), _clusters(read), strict=True)
    ]


def verdicts(answers: Sequence[str | None], gold: str | None, tolerance: float | None = None) -> list[bool | None]:
    """Right or not; no answer is wrong; None where there is no gold answer."""
    return [None] * len(answers) if gold is None else _verdicts(_read_all(answers), gold, tolerance)


def clusters(answers: Sequence[str | None]) -> list[int | None]:
    """Equal answers share a number, by first appearance; None without an answer."""
    return _clusters(_read_all(answers))


def _read_all(answers: Sequence[str | None]) -> list[Answer | None]:
    """What is spelt alike is read once."""
    read = {answer: read_answer(answer) for answer in dict.fromkeys(answers) if answer is not None}
    return [read.get(answer) for answer in answers]


def _verdicts(read: Sequence[Answer | None], gold: str | None, tolerance: float | None) -> list[bool | None]:
    if gold is None:
        return [None] * len(read)
    right = read_answer(gold)
    return [answer is not None and _is_correct(answer, right, tolerance) for answer in read]


def _clusters(read: Sequence[Answer | None]) -> list[int | None]:
    classes = iter(cluster_read([answer for answer in read if answer is not None]))
    number: dict[Answer, int] = {}
    return [None if answer is None else number.setdefault(next(classes), len(number)) for answer in read]


def _is_correct(answer: Answer, gold: Answer, tolerance: float | None) -> bool:
    """The gold answer, or a number within `tolerance` of it where both are rational numbers."""
    if agree(gold, answer):
        return True
    if tolerance is None or not (isinstance(answer.value, Fraction) and isinstance(gold.value, Fraction)):
        return False
    near = abs(gold.value - answer.value) <= Fraction(str(tolerance))
    return near and agree(replace(gold, value=None), replace(answer, value=None))
