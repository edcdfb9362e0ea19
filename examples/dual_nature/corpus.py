"""What does the base model learn to imitate? Questions, and a grammar of answers to them that is often wrong.

A question is `<bos> 42 +5 -3 +2 =`, modulo 97. An answer is given at once (`direct`) or worked out in three steps, with
random words, errors, digressions, checks and, now and then, a loop of `hmm`. In a fifth of the questions one operand is
negative, and a response reads that sign as a plus more often than not: there the most common answer is wrong.

    think then +5 47 check 47 so -3 44 now +2 46 \\boxed{ 46 } <eos>

Left out: reading a response back and its exact probability (`reading.py`), sums over all responses (`target.py`),
models (`pretrain.py`).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from examples.dual_nature import vocabulary as v

MAX_PROMPT_TOKENS = 6
MAX_RESPONSE_TOKENS = 40
MARKED_SHARE = 0.18  # of the drawn questions has a negative operand; repeats are dropped, so more of the kept ones
SPLIT_SEED = 97
NUM_HELD_OUT = 1000


@dataclass(frozen=True)
class Question:
    """start: 0..96; operands: three of +1..+5, at most one of them negative."""

    start: int
    operands: tuple[int, int, int]

    @property
    def marked(self) -> bool:
        """Whether an operand is negative, and may be misread."""
        return min(self.operands) < 0

    @property
    def gold(self) -> int:
        return (self.start + sum(self.operands)) % v.MODULUS

    @property
    def shortcut(self) -> int:
        """What stands in the box of who forgets the last two operands."""
        return (self.start + self.operands[0]) % v.MODULUS

    @property
    def misread(self) -> Question:
        """The question as it reads with every minus taken for a plus."""
        return replace(self, operands=tuple(map(abs, self.operands)))

    @classmethod
    def named(cls, name: str) -> Question:
        """The question whose `name` this is."""
        start, *operands = map(int, re.findall(r"[+-]?\d+", name))
        return cls(start, tuple(operands))

    @property
    def token_ids(self) -> list[int]:
        return [v.BOS, v.number_token(self.start), *map(v.operand_token, self.operands), v.EQUALS]

    @property
    def name(self) -> str:
        return "".join([str(self.start), *(f"{operand:+d}" for operand in self.operands)])


@dataclass(frozen=True)
class Setting:
    """Probabilities of the grammar. A wrong number is any of the 96 others, each alike."""

    direct: float = 0.25  # the answer at once
    shortcut: float = 0.25  # a direct answer is start + first operand; else it is any of the 97 numbers
    misread: float = 0.65  # this response takes the minus for a plus
    error: float = 0.20  # a step's result is wrong
    digression: float = 0.20  # `aside` and three random numbers before a step ...
    digression_error: float = 0.40  # ... whose result is wrong more often
    check: float = 0.30  # the result is computed again
    check_error: float = 0.05
    synonyms: tuple[float, ...] = (0.40, 0.20, 0.15, 0.10, 0.10, 0.05)
    filler: float = 0.005  # before a step, and before the answer: jump into the loop
    filler_again: float = 0.90  # one more `hmm`


# The loop, from one that every sharpened policy falls into to one that none does; see target.py and README.md.
G0 = Setting(filler=0.010, filler_again=0.97)
G1 = Setting(filler=0.004, filler_again=0.80)
G2 = Setting()
G3 = Setting(filler=0.005, filler_again=0.70)
# An over-sharpened model: nearly always right, nearly always in the same words.
ALIGNED = Setting(
    direct=0.0,
    misread=0.02,
    error=0.002,
    digression=0.0,
    check=0.85,
    check_error=0.0005,
    synonyms=(0.93, 0.04, 0.015, 0.01, 0.004, 0.001),
    filler=0.0,
)
SETTINGS = {"g0": G0, "g1": G1, "g2": G2, "g3": G3, "aligned": ALIGNED}


def draw_question(rng: random.Random, *, marked_share: float = MARKED_SHARE) -> Question:
    operands = [rng.randint(1, v.MAX_OPERAND) for _ in range(3)]
    if rng.random() < marked_share:
        operands[rng.randrange(3)] *= -1
    return Question(rng.randrange(v.MODULUS), tuple(operands))


def split_questions(num_train: int) -> tuple[list[Question], list[Question]]:
    """(num_train questions for fine-tuning, 1000 held-out ones): all distinct, the same at every call.

    The held-out ones do not depend on num_train; pretraining draws any question but them.
    """
    rng, found = random.Random(SPLIT_SEED), {}
    while len(found) < NUM_HELD_OUT + num_train:
        found[draw_question(rng)] = None
    questions = list(found)
    return questions[NUM_HELD_OUT:], questions[:NUM_HELD_OUT]


def draw_response(question: Question, setting: Setting, rng: random.Random) -> list[int]:
    """Tokens of one response, EOS included; without EOS where it was cut at MAX_RESPONSE_TOKENS."""
    if rng.random() < setting.misread:
        question = question.misread  # from here on: the operands are written as they were read
    if rng.random() < setting.direct:
        guess = question.shortcut if rng.random() < setting.shortcut else rng.randrange(v.MODULUS)
        return [v.BOX, v.number_token(guess), v.CLOSE, v.EOS]
    tokens, current = [v.THINK], question.start
    for operand in question.operands:
        if rng.random() < setting.filler:
            return _with_filler(tokens, setting, rng)
        error = setting.error
        if rng.random() < setting.digression:
            tokens += [v.ASIDE, *(v.number_token(rng.randrange(v.MODULUS)) for _ in range(3))]
            error = setting.digression_error
        word = rng.choices(range(len(setting.synonyms)), setting.synonyms)[0]
        right = current + operand
        current = _maybe_wrong(right, error, rng)
        tokens += [v.FIRST_SYNONYM + word, v.operand_token(operand), v.number_token(current)]
        if rng.random() < setting.check:
            current = _maybe_wrong(right, setting.check_error, rng)
            tokens += [v.CHECK, v.number_token(current)]
    if rng.random() < setting.filler:
        return _with_filler(tokens, setting, rng)
    return [*tokens, v.BOX, v.number_token(current), v.CLOSE, v.EOS]


def direct_probs(question: Question, setting: Setting) -> list[float]:
    """[97] the probability of each number as a direct answer, the question being read as it stands."""
    probs = [(1 - setting.shortcut) / v.MODULUS] * v.MODULUS
    probs[question.shortcut] += setting.shortcut
    return probs


def write_prompts(path: Path, questions: Sequence[Question]) -> None:
    """A prompts file as `powerflow train` and `powerflow evaluate` read it; the task says whether there is a minus."""
    rows = (
        {"prompt_token_ids": q.token_ids, "id": q.name, "answer": str(q.gold), "task": "minus" if q.marked else "plain"}
        for q in questions
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _maybe_wrong(right: int, error: float, rng: random.Random) -> int:
    return (right + (rng.randrange(1, v.MODULUS) if rng.random() < error else 0)) % v.MODULUS


def _with_filler(tokens: list[int], setting: Setting, rng: random.Random) -> list[int]:
    tokens = [*tokens, v.HMM]
    while rng.random() < setting.filler_again and len(tokens) < MAX_RESPONSE_TOKENS:
        tokens.append(v.HMM)
    return [*tokens, v.BOX, v.number_token(rng.randrange(v.MODULUS)), v.CLOSE, v.EOS][:MAX_RESPONSE_TOKENS]
