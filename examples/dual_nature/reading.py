"""What does a response say, and how probable was it? The grammar of `corpus.py`, read backwards.

Left out: responses that are not of the grammar, beyond saying so; their boxed answer, if any, is `measure.py`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from examples.dual_nature import vocabulary as v
from examples.dual_nature.corpus import MAX_RESPONSE_TOKENS, Question, Setting, direct_probs


@dataclass(frozen=True)
class Step:
    """One step as written: `aside` or not, word, operand, result, and the checked result where there is one."""

    digression: bool
    synonym: int
    operand: int
    result: int
    check: int | None


@dataclass(frozen=True)
class Parsed:
    """What a response of the grammar says. answer: None where it was cut before it."""

    steps: tuple[Step, ...] | None  # None: a direct answer
    num_filler: int
    box: bool  # False: cut inside the loop
    answer: int | None
    ended: bool


_NUMBER = r"\d+ "
_STEP = rf"(aside {_NUMBER * 3})?({'|'.join(v.SYNONYMS)}) ([+-]\d) (\d+) (?:check (\d+) )?"
_ENDED = re.compile(rf"(?:(think )((?:{_STEP}){{0,3}})((?:hmm )*))?\\boxed{{ (\d+) }} <eos> ")
_CUT = re.compile(rf"(think )((?:{_STEP}){{0,3}})((?:hmm )+)(?:\\boxed{{ (?:(\d+) (?:}} )?)?)?")
_EACH_STEP = re.compile(_STEP)


def parse_response(question: Question, tokens: Sequence[int]) -> Parsed | None:
    """The response's parts if the grammar can write it, whatever the probability; None if it cannot."""
    text = v.text_of(tokens) + " "
    ended = v.EOS in tokens
    if len(tokens) > MAX_RESPONSE_TOKENS or (not ended and len(tokens) < MAX_RESPONSE_TOKENS):
        return None
    match = (_ENDED if ended else _CUT).fullmatch(text)
    if match is None:
        return None
    thinking, written, filler, answer = match.group(1), match.group(2), match.group(8), match.group(9)
    answer = int(answer) if answer is not None else None
    if thinking is None:
        return Parsed(None, 0, True, answer, ended)
    steps = tuple(
        Step(aside is not None, v.SYNONYMS.index(word), int(operand), int(result), int(check) if check else None)
        for aside, word, operand, result, check in (each.groups() for each in _EACH_STEP.finditer(written))
    )
    operands, num_filler = tuple(step.operand for step in steps), len(filler.split())
    if not any(operands == asked.operands[: len(steps)] for asked in (question, question.misread)):
        return None
    if num_filler == 0 and (len(steps) < 3 or answer != current_of(steps[-1])):
        return None
    return Parsed(steps, num_filler, v.BOX in tokens, answer, ended)


def current_of(step: Step) -> int:
    """The number a step hands on: the checked one, where there is a check."""
    return step.result if step.check is None else step.check


def log_prob(question: Question, setting: Setting, tokens: Sequence[int]) -> float:
    """Exact natural-log probability of a response, -inf for what the grammar cannot write."""
    parsed = parse_response(question, tokens)
    if parsed is None:
        return -math.inf
    readings = ((question, 1 - setting.misread), (question.misread, setting.misread))
    total = sum(weight * _prob_as_read(asked, setting, parsed, len(tokens)) for asked, weight in readings)
    return math.log(total) if total > 0 else -math.inf


def _prob_as_read(question: Question, setting: Setting, parsed: Parsed, num_tokens: int) -> float:
    if parsed.steps is None:
        return setting.direct * direct_probs(question, setting)[parsed.answer]
    if tuple(step.operand for step in parsed.steps) != question.operands[: len(parsed.steps)]:
        return 0.0
    prob, current = 1 - setting.direct, question.start
    for step in parsed.steps:
        prob *= (1 - setting.filler) * setting.synonyms[step.synonym]
        prob *= setting.digression / v.MODULUS**3 if step.digression else 1 - setting.digression
        right = current + step.operand
        prob *= _number_prob(step.result, right, setting.digression_error if step.digression else setting.error)
        if step.check is None:
            prob *= 1 - setting.check
        else:
            prob *= setting.check * _number_prob(step.check, right, setting.check_error)
        current = current_of(step)
    if parsed.num_filler == 0:
        return prob * (1 - setting.filler)
    again = setting.filler_again
    prob *= setting.filler * again ** (parsed.num_filler - 1)
    if not parsed.box:
        return prob
    return prob * (1 - again) / (v.MODULUS if parsed.answer is not None else 1)


def _number_prob(value: int, right: int, error: float) -> float:
    return 1 - error if (value - right) % v.MODULUS == 0 else error / (v.MODULUS - 1)
