"""What is the optimum of a sharpened or flattened corpus? Exact sums over all responses of the grammar.

    p*(y) ~ p(y)^alpha exp(-lambda |y|),  lambda the one root of  sum_y p(y)^alpha exp(-lambda |y|) = 1

A response is a chain of independent parts, so the sum over billions of responses is a product of short polynomials in
the length; a wrong number shifts all that follow, so the answers are a circular convolution modulo 97.

Left out: what a trained model makes of the corpus (`measure.py`), training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from examples.dual_nature import vocabulary as v
from examples.dual_nature.corpus import MAX_RESPONSE_TOKENS, Question, Setting, direct_probs

DIRECT, STEPS, FILLER = range(3)
LENGTHS = np.arange(MAX_RESPONSE_TOKENS + 1)
PLAIN = Question(42, (5, 3, 2))  # any question without a minus has the same sums, but for which answer is which
MARKED = Question(42, (5, -3, 2))
NO_ANSWER = v.MODULUS  # the column of responses that were cut before their answer


@dataclass(frozen=True)
class Target:
    """p* for one question. lam: nats per token; the others are shares and means under p*."""

    lam: float
    mean_tokens: float
    accuracy: float
    misread_share: float  # answers as if the minus were a plus
    direct_share: float
    filler_share: float
    entropy: float  # nats per response


def power_sums(question: Question, setting: Setting, alpha: float) -> np.ndarray:
    """[3 styles, 41 lengths, 98 answers] fp64: the sum of p(y)^alpha over the responses of each kind."""
    sums = np.zeros((3, len(LENGTHS), v.MODULUS + 1))
    readings = [(question, 1.0)]
    if question.marked:
        readings = [(question, 1 - setting.misread), (question.misread, setting.misread)]
    direct = sum(weight * np.array(direct_probs(asked, setting)) for asked, weight in readings)
    sums[DIRECT, 4, : v.MODULUS] = (setting.direct * direct) ** alpha

    step = _step_sums(setting, alpha) * (1 - setting.filler) ** alpha
    written = np.zeros_like(step)  # after 0, 1, 2, 3 steps: [lengths, what the current number is off by]
    written[1, 0] = (1 - setting.direct) ** alpha
    for place in range(4):
        # the reading shows once the minus is written
        seen = place > 0 and min(question.operands[:place]) < 0
        branches = sum(weight**alpha for _, weight in readings) if seen else 1.0
        sums[FILLER] += branches * _filler_sums(written.sum(axis=1), setting, alpha)
        if place < 3:
            written = _convolve(written, step)
    ended = _later(written, 4) * (1 - setting.filler) ** alpha
    for asked, weight in readings:
        sums[STEPS, :, : v.MODULUS] += weight**alpha * np.roll(ended, asked.gold, axis=1)
    return sums


def solve_target(question: Question, setting: Setting, alpha: float, *, tilt_cap: int | None = None) -> Target:
    """p* at this alpha; with a tilt cap M of `objective.tilt_cap`, p^alpha exp(-lambda min(|y|, M)).

    Raises ValueError where alpha is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha}: must be positive")
    sums, counted = power_sums(question, setting, alpha), _counted(tilt_cap)
    lam = length_tilt(np.bincount(counted, sums.sum(axis=(0, 2))))
    return _described(question, setting, alpha, lam, sums, counted)


def solve_power(question: Question, setting: Setting, alpha: float) -> Target:
    """p^alpha itself, normalised and not tilted: what trajectory-level objectives aim at. lam is 0."""
    return _described(question, setting, alpha, 0.0, power_sums(question, setting, alpha), LENGTHS)


def _counted(tilt_cap: int | None) -> np.ndarray:
    """[41] what each length counts as in the tilt."""
    return LENGTHS if tilt_cap is None else np.minimum(LENGTHS, tilt_cap)


def length_tilt(by_length: np.ndarray) -> float:
    """lambda with sum_n by_length[n] exp(-lambda n) = 1, by bisection; by_length: fp64, not negative."""
    lengths = np.flatnonzero(by_length)
    logs = np.log(by_length[lengths])
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.logaddexp.reduce(logs - middle * lengths) > 0 else (low, middle)
    return (low + high) / 2


def loop_free_lambda(question: Question, setting: Setting, alpha: float, *, tilt_cap: int | None = None) -> float:
    """lambda at which the responses without a loop sum to 1. `Target.lam`, of the fixed point, counts the loops too:
    where they have most of the mass it is the price at which they break even, and says nothing of the trap."""
    sums = power_sums(question, replace(setting, filler=0.0), alpha).sum(axis=(0, 2))
    return length_tilt(np.bincount(_counted(tilt_cap), sums))


def trap_margin(
    setting: Setting, alpha: float, *, limit: int = MAX_RESPONSE_TOKENS, tilt_cap: int | None = None
) -> float:
    """N (-lambda - alpha r) - alpha c in nats: a loop that fills all N tokens against working it out; N is `limit`.

    lambda: `loop_free_lambda` (for a tilt cap M it is counted on M tokens); r: nats of one more `hmm`; c: of the way
    in. Above 0 the sharpened policy ends in the loop. One way in and one length are counted, and responses that a
    lower limit cuts are not; `solve_target` counts them all.
    """
    if setting.filler == 0:
        return -math.inf
    lam = loop_free_lambda(PLAIN, setting, alpha, tilt_cap=tilt_cap)
    entry, again = -math.log((1 - setting.direct) * setting.filler), -math.log(setting.filler_again)
    counted = limit if tilt_cap is None else min(limit, tilt_cap)
    return counted * -lam - alpha * (limit * again + entry)


def _described(
    question: Question, setting: Setting, alpha: float, lam: float, sums: np.ndarray, counted: np.ndarray
) -> Target:
    """counted: [41] what each length counts as in the tilt."""
    tilt = np.exp(-lam * counted)[None, :, None]
    shares = sums * tilt
    total = shares.sum()
    shares = shares / total
    by_length = shares.sum(axis=(0, 2))
    mean_tokens, mean_counted = float((by_length * LENGTHS).sum()), float((by_length * counted).sum())
    # E[log p] under p* is the derivative of log sum p^alpha exp(-lambda n) in alpha
    nearby = [np.log((power_sums(question, setting, a) * tilt).sum()) for a in (alpha - 1e-4, alpha + 1e-4)]
    mean_log_prob = (nearby[1] - nearby[0]) / 2e-4
    answers, styles = shares.sum(axis=(0, 1)), shares.sum(axis=(1, 2))
    return Target(
        lam=lam,
        mean_tokens=mean_tokens,
        accuracy=float(answers[question.gold]),
        misread_share=float(answers[question.misread.gold]) if question.marked else 0.0,
        direct_share=float(styles[DIRECT]),
        filler_share=float(styles[FILLER]),
        entropy=float(math.log(total) + lam * mean_counted - alpha * mean_log_prob),
    )


def _step_sums(setting: Setting, alpha: float) -> np.ndarray:
    """[41, 97]: sum of p^alpha over one step, by its length and by what it adds to the error so far."""
    sums = np.zeros((len(LENGTHS), v.MODULUS))
    words = sum(prob**alpha for prob in setting.synonyms)
    for length, chance, ways, error in (
        (3, 1 - setting.digression, 1, setting.error),
        (7, setting.digression / v.MODULUS**3, v.MODULUS**3, setting.digression_error),
    ):
        start, result = words * ways * chance**alpha, _number_sums(error, alpha)
        sums[length] += start * (1 - setting.check) ** alpha * result
        sums[length + 2] += start * setting.check**alpha * result.sum() * _number_sums(setting.check_error, alpha)
    return sums


def _number_sums(error: float, alpha: float) -> np.ndarray:
    """[97] p^alpha of a number that is off by 0, 1, ..., 96."""
    sums = np.full(v.MODULUS, (error / (v.MODULUS - 1)) ** alpha)
    sums[0] = (1 - error) ** alpha
    return sums


def _filler_sums(entered: np.ndarray, setting: Setting, alpha: float) -> np.ndarray:
    """[41, 98]: sum of p^alpha over the loops behind what was written so far; entered: [41], by its length."""
    sums = np.zeros((len(LENGTHS), v.MODULUS + 1))
    if setting.filler == 0:
        return sums
    again, leave, answer = setting.filler_again**alpha, (1 - setting.filler_again) ** alpha, v.MODULUS**-alpha
    looped = _later(entered, 1) * setting.filler**alpha
    for _ in range(MAX_RESPONSE_TOKENS):
        sums[4:, : v.MODULUS] += looped[:-4, None] * leave * answer
        # the last token that fits is `hmm`, the opening of the box, the number, or its closing
        sums[-1, NO_ANSWER] += looped[-1] + looped[-2] * leave
        sums[-1, : v.MODULUS] += (looped[-3] + looped[-4]) * leave * answer
        looped = _later(looped, 1) * again
    return sums


def _later(sums: np.ndarray, tokens: int) -> np.ndarray:
    """The same responses with more tokens behind them; those beyond the cap are none of the grammar's."""
    moved = np.zeros_like(sums)
    moved[tokens:] = sums[:-tokens]
    return moved


def _convolve(written: np.ndarray, step: np.ndarray) -> np.ndarray:
    """One step more: lengths add, errors add modulo 97."""
    left, right = np.fft.rfft(written, axis=1), np.fft.rfft(step, axis=1)
    out = np.zeros_like(left)
    for length in np.flatnonzero(step.any(axis=1)):
        out[length:] += left[: len(LENGTHS) - length] * right[length]
    return np.maximum(np.fft.irfft(out, n=v.MODULUS, axis=1), 0.0)
