"""Which answer does a response give, and are two answers the same one?

An answer is what stands in the last box that is not in a thought. Each is read once, to a value and the name and unit
that it says (`answer_reading.py`). Two answers are the same where the values are equal and neither names nor units
contradict each other. So 5 cm and 5 are the same answer, 5 cm and 5 inches are two: a bare number fits either of them.

Clusters are classes that do not depend on the order of the answers: a bare 5 joins the 5 cm where that is the only unit
said with 5 in the group, and stands alone beside 5 cm and 5 inches. ANSWERS.md has the rules, with a table that the
tests read.

Left out: rewards made of equality (`training/rewards.py`), the readers of benchmarks (`evaluation/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_powerflow.data.answer_reading import ParsedAnswer, read_answer
from megatron_powerflow.data.boxes import last_boxed

THOUGHT, END_OF_THOUGHT = "<think>", "</think>"


def extract_answer(response: str) -> str | None:
    """Returns the content of the last box that is in no thought; None without one.

    A thought that does not end reaches to the end of the response.
    """
    behind_thoughts = response.rpartition(END_OF_THOUGHT)[2]
    return last_boxed(behind_thoughts.partition(THOUGHT)[0])


def same_answer(gold: str, given: str | None) -> bool:
    """Whether `given` is the answer `gold`; the relation is symmetric. A missing answer (None) equals no answer."""
    return given is not None and agree(read_answer(gold), read_answer(given))


def agree(first: ParsedAnswer, second: ParsedAnswer) -> bool:
    """Whether two answers have equal values, and no names or units that differ."""
    return first.value == second.value and _fits(first.name, second.name) and _fits(first.unit, second.unit)


def cluster_answers(answers: Sequence[str | None]) -> list[int]:
    """Returns the cluster of each answer: equal answers share a number, numbered by first appearance.

    A missing answer is a cluster of its own (EMPO, github.com/QingyangZhang/EMPO).
    """
    classes = iter(equality_classes([read_answer(answer) for answer in answers if answer is not None]))
    number: dict = {}
    return [
        number.setdefault(("none", index) if answer is None else next(classes), len(number))
        for index, answer in enumerate(answers)
    ]


def equality_classes(answers: Sequence[ParsedAnswer]) -> list[ParsedAnswer]:
    """Returns the class of each answer, as an answer that is equal for equal ones.

    A name or unit that an answer leaves out is taken from the answers with the same value, where they agree on one.
    """
    names: dict = {}
    units: dict = {}
    for answer in answers:
        names.setdefault(answer.value, set()).add(answer.name)
        units.setdefault(answer.value, set()).add(answer.unit)
    return [
        replace(answer, name=_only(answer.name, names[answer.value]), unit=_only(answer.unit, units[answer.value]))
        for answer in answers
    ]


def _only(stated: str | None, among: set[str | None]) -> str | None:
    others = among - {None}
    return next(iter(others)) if stated is None and len(others) == 1 else stated


def _fits(first: str | None, second: str | None) -> bool:
    return first is None or second is None or first == second


@dataclass(frozen=True, slots=True)
class Grade:
    """Holds the grade of one answer.

    correct: None without a gold answer. cluster: equal answers to a question share a number; None without an answer.
    """

    correct: bool | None
    cluster: int | None


def grade(answers: Sequence[str | None], gold: str | None, tolerance: float | None = None) -> list[Grade]:
    """Returns the grades of the answers to one question, in their order.

    tolerance: numbers this near to the gold answer are right, too; None allows equal ones only.
    """
    read = _read_all(answers)
    return [
        Grade(correct, cluster)
        for correct, cluster in zip(_verdicts(read, gold, tolerance), _clusters(read), strict=True)
    ]


def verdicts(answers: Sequence[str | None], gold: str | None, tolerance: float | None = None) -> list[bool | None]:
    """Returns whether each answer is right; a missing answer is wrong; None where there is no gold answer."""
    return [None] * len(answers) if gold is None else _verdicts(_read_all(answers), gold, tolerance)


def clusters(answers: Sequence[str | None]) -> list[int | None]:
    """Returns the cluster of each answer, numbered by first appearance; None for a missing answer."""
    return _clusters(_read_all(answers))


def _read_all(answers: Sequence[str | None]) -> list[ParsedAnswer | None]:
    """Reads the answers; those with the same text are read once."""
    read = {answer: read_answer(answer) for answer in dict.fromkeys(answers) if answer is not None}
    return [None if answer is None else read[answer] for answer in answers]


def _verdicts(read: Sequence[ParsedAnswer | None], gold: str | None, tolerance: float | None) -> list[bool | None]:
    if gold is None:
        return [None] * len(read)
    right = read_answer(gold)
    return [answer is not None and _is_correct(answer, right, tolerance) for answer in read]


def _clusters(read: Sequence[ParsedAnswer | None]) -> list[int | None]:
    classes = iter(equality_classes([answer for answer in read if answer is not None]))
    number: dict[ParsedAnswer, int] = {}
    return [None if answer is None else number.setdefault(next(classes), len(number)) for answer in read]


def _is_correct(answer: ParsedAnswer, gold: ParsedAnswer, tolerance: float | None) -> bool:
    """Whether the answer is the gold one, or within `tolerance` of it where both are rational numbers."""
    if agree(gold, answer):
        return True
    if tolerance is None or not (isinstance(answer.value, Fraction) and isinstance(gold.value, Fraction)):
        return False
    near = abs(gold.value - answer.value) <= Fraction(str(tolerance))
    return near and agree(replace(gold, value=None), replace(answer, value=None))
