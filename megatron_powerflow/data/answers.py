"""Which answer does a response give, and are two answers the same one?

An answer is what stands in the last `\\boxed{}`. Equality is math-verify's, so that 1/2, 0.5 and \\frac{1}{2} are one
answer; plain numbers and letters are settled without it.

Left out: rewards made of equality (`training/rewards.py`), the readers of benchmarks (`evaluation/`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_powerflow.data.response_format import last_boxed

TIMEOUT_SECONDS = 3  # of one parse or comparison: answers are hostile, and 9^{9^{9}} is an answer


def extract_answer(response: str) -> str | None:
    """What stands in the last complete \\boxed{...}; None without one."""
    return last_boxed(response)


def same_answer(gold: str, given: str | None) -> bool:
    """Is `given` the answer `gold`? No answer is no answer's equal. math-verify takes the gold answer first."""
    if given is None:
        return False
    simple = _simple_comparison(gold, given)
    return _verified(_parsed(gold), _parsed(given)) if simple is None else simple


def cluster_answers(answers: Sequence[str | None]) -> list[int]:
    """Cluster of each answer: equal answers share a number, clusters are numbered by first appearance.

    A missing answer is a cluster of its own (EMPO, github.com/QingyangZhang/EMPO).
    """
    clusters: list[int] = []
    first_of: dict[int, str] = {}
    for answer in answers:
        known = next((c for c, first in first_of.items() if answer is not None and same_answer(first, answer)), None)
        if known is None:
            known = max(clusters, default=-1) + 1
            if answer is not None:
                first_of[known] = answer
        clusters.append(known)
    return clusters


def _simple_comparison(gold: str, given: str) -> bool | None:
    """The verdict where it needs no mathematics; None where it does."""
    gold, given = _bare(gold), _bare(given)
    if gold == given:
        return True
    numbers = _number(gold), _number(given)
    if None not in numbers:
        return numbers[0] == numbers[1]
    if re.fullmatch(r"[A-Z]", gold) and re.fullmatch(r"[A-Z]", given):
        return False  # two choices
    return None


def _bare(answer: str) -> str:
    """Without dollar signs, \\text{}, final dots and spaces at the ends: what people put around a choice or number."""
    text = answer.strip().strip("$").strip()
    text = re.sub(r"^\\(?:text|mathrm|textbf)\{([^{}]*)\}$", r"\1", text)
    return text.rstrip(".").strip()


def _number(text: str) -> Fraction | None:
    if not re.fullmatch(r"[-+]?\d{1,40}(?:\.\d{1,40})?(?:/\d{1,40})?", text) or ("." in text and "/" in text):
        return None
    try:
        return Fraction(text)
    except ZeroDivisionError:
        return None


def _parsed(answer: str) -> list:
    from math_verify import parse

    return parse(f"\\boxed{{{answer}}}", parsing_timeout=TIMEOUT_SECONDS)


def _verified(gold: list, given: list) -> bool:
    from math_verify import verify

    return bool(verify(gold, given, timeout_seconds=TIMEOUT_SECONDS))
