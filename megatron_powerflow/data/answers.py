"""Which answer does a response give, and are two answers the same one?

An answer is what stands in the last box that is not in a thought. Each is read once, to a value and the name and unit
that it says (`answer_reading.py`); two answers are the same where the values are equal and neither names nor units
contradict each other. So 5 cm and 5 are one answer, 5 cm and 5 inches are two: a bare number fits either of them.

Clusters are classes whatever the order: a bare 5 joins the 5 cm where that is the only unit said with 5 in the group,
and stands alone beside 5 cm and 5 inches. The rules, with a table that the tests read: ANSWERS.md.

Left out: rewards made of equality (`training/rewards.py`), the readers of benchmarks (`evaluation/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_powerflow.data.answer_reading import Answer, read_answer
from megatron_powerflow.data.boxes import last_boxed

THOUGHT, END_OF_THOUGHT = "<think>", "</think>"


def extract_answer(response: str) -> str | None:
    """What stands in the last box behind the last thought; None without one, and where a thought does not end."""
    said = response.rpartition(END_OF_THOUGHT)[2]
    return last_boxed(said.partition(THOUGHT)[0])


def same_answer(gold: str, given: str | None) -> bool:
    """Is `given` the answer `gold`? Symmetric. No answer is no answer's equal."""
    return given is not None and agree(read_answer(gold), read_answer(given))


def agree(one: Answer, other: Answer) -> bool:
    """Equal values, and no name or unit that differs."""
    return one.value == other.value and _fits(one.name, other.name) and _fits(one.unit, other.unit)


def cluster_answers(answers: Sequence[str | None]) -> list[int]:
    """Cluster of each answer: equal answers share a number, clusters are numbered by first appearance.

    A missing answer is a cluster of its own (EMPO, github.com/QingyangZhang/EMPO).
    """
    classes = iter(cluster_read([read_answer(answer) for answer in answers if answer is not None]))
    number: dict = {}
    return [
        number.setdefault(("none", place) if answer is None else next(classes), len(number))
        for place, answer in enumerate(answers)
    ]


def cluster_read(answers: Sequence[Answer]) -> list[Answer]:
    """The class of each: a name or unit that is left out is the one that the others give this value, if it is one."""
    names: dict = {}
    units: dict = {}
    for answer in answers:
        names.setdefault(answer.value, set()).add(answer.name)
        units.setdefault(answer.value, set()).add(answer.unit)
    return [
        replace(answer, name=_only(answer.name, names[answer.value]), unit=_only(answer.unit, units[answer.value]))
        for answer in answers
    ]


def _only(said: str | None, among: set[str | None]) -> str | None:
    others = among - {None}
    return next(iter(others)) if said is None and len(others) == 1 else said


def _fits(one: str | None, other: str | None) -> bool:
    return one is None or other is None or one == other


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
    return [None if answer is None else read[answer] for answer in answers]


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
