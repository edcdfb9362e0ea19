"""Have the lengths moved since the first steps by more than their noise? A test that is made after every step.

The unit is the prompt: rollouts of one prompt are alike, prompts differ. Each line holds the mean over a step's prompts
and its standard error. The mean of the recent steps is compared with that of the first ones, and both are noisy: the
noise of a step's mean is the larger of its standard error and its spread over the first steps (policies wander, too).
The bound is NUM_ERRORS standard errors. By the union bound over 500 steps and three tests, a stationary run raises an
alarm with probability 1500 x 2.9e-7 under a normal law; the rest of the 1 % that is allowed is for heavier tails and
for noise that is itself estimated.

A policy that is spoilt by its first updates spoils the first steps, too. So the recent steps are also compared with the
very first one, where the policy is still the base model. That step has few prompts, and lengths do settle in the first
steps, so only a GROSS change counts (a share that rises by a half, a length four times the other), by as many errors.

Lines without these numbers (a run of an older version, steps of one prompt) are left out. The first steps are then the
first lines that have the numbers, and a run of one prompt a step has no such test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BASELINE_STEPS = 10
RECENT_STEPS = 5
MIN_DEGREES = 40  # of freedom (a step has its prompts less one) in the recent steps; twice that in the first ones
NUM_ERRORS = 5.0

GROSS_RISE = 0.5  # of the truncated share, in [0, 1]
GROSS_FACTOR = 4.0  # between typical (geometric mean) lengths

TRUNCATED = ("truncated_fraction", "truncated_fraction_error")
LOG_LENGTH = ("response_log_length_mean", "response_log_length_error")


@dataclass(frozen=True, slots=True)
class Shift:
    """Holds the means over the first and the recent steps, and the standard error of their difference."""

    before: float
    now: float
    error: float

    @property
    def change(self) -> float:
        """Returns the recent mean less the first one."""
        return self.now - self.before

    @property
    def significant(self) -> bool:
        """Whether the change is over NUM_ERRORS standard errors."""
        return abs(self.change) > NUM_ERRORS * self.error


def shift(lines: Sequence[Mapping[str, float]], names: tuple[str, str]) -> Shift | None:
    """Returns how far a metric has moved since the first steps; None with too few steps that have it.

    lines: of metrics.jsonl, oldest first. names: the metric's, a mean over prompts, and its standard error's.
    """
    usable = _lines_with_error(lines, names)
    return _difference(usable, names, windows(usable[0]["num_prompts"])[0]) if usable else None


def gross_shift(lines: Sequence[Mapping[str, float]], names: tuple[str, str]) -> Shift | None:
    """Returns how far a metric has moved since the very first step; None also where the change is not gross.

    The first step's policy is the base model. names: as in `shift`.
    """
    usable = _lines_with_error(lines, names)
    moved = _difference(usable, names, 1) if usable else None
    least = GROSS_RISE if names is TRUNCATED else np.log(GROSS_FACTOR)
    return moved if moved and moved.significant and abs(moved.change) > least else None


def _lines_with_error(lines: Sequence[Mapping[str, float]], names: tuple[str, str]) -> list[Mapping[str, float]]:
    return [line for line in lines if names[1] in line]


def windows(num_prompts: float) -> tuple[int, int]:
    """Returns how many first and how many recent steps are compared, in a run of two or more prompts a step."""
    enough = math.ceil(MIN_DEGREES / (num_prompts - 1))
    return max(BASELINE_STEPS, 2 * enough), max(RECENT_STEPS, enough)


def _difference(lines: Sequence[Mapping[str, float]], names: tuple[str, str], num_first: int) -> Shift | None:
    mean, error = names
    num_recent = windows(lines[0]["num_prompts"])[1]
    if len(lines) < num_first + num_recent:
        return None
    first, recent = lines[:num_first], lines[-num_recent:]
    before, now = (np.array([line[mean] for line in part]) for part in (first, recent))
    spread = before.var(ddof=1) if num_first > 1 else 0.0
    noise = sum(max(spread, np.mean([line[error] ** 2 for line in part])) / len(part) for part in (first, recent))
    return Shift(float(before.mean()), float(now.mean()), float(np.sqrt(noise)))
