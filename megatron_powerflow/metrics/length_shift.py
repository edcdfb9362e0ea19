"""Have the lengths moved since the first steps by more than their noise? A test looked at after every step.

The unit is the prompt: rollouts of one prompt are alike, prompts differ. Each line holds the mean over a step's prompts
and its standard error; the mean of the recent steps is compared with that of the first ones, and both have noise. The
noise of a step's mean is the larger of its standard error and its spread over the first steps (policies wander, too).
NUM_ERRORS standard errors: by the union bound over 500 looks and three tests, a stationary run rings with probability
1500 x 2.9e-7 under a normal law; the rest of the 1 % is for tails and for noise that is itself estimated.

A policy that is spoilt by its first updates spoils the first steps, too. So the recent steps are also compared with the
first one, where the policy is still the base model: that step is few prompts, and lengths do settle in the first steps,
so only a GROSS change counts (a share that rises by a half, a length four times another), by as many errors.

Lines without these numbers (a run of an older version, steps of one prompt) are left out: the first steps are then the
first that have them, and a run of one prompt a step has no such test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BASELINE_STEPS = 10
RECENT_STEPS = 5
MIN_DEGREES = 40  # of freedom, prompts less one a step, in the recent steps; twice that in the first ones
NUM_ERRORS = 5.0

GROSS_RISE = 0.5  # of the truncated share
GROSS_FACTOR = 4.0  # between typical lengths

TRUNCATED = ("truncated_fraction", "truncated_fraction_error")
LOG_LENGTH = ("response_log_length_mean", "response_log_length_error")


@dataclass(frozen=True, slots=True)
class Shift:
    """Means over the first and the recent steps, and the standard error of their difference."""

    before: float
    now: float
    error: float

    @property
    def change(self) -> float:
        return self.now - self.before

    @property
    def significant(self) -> bool:
        return abs(self.change) > NUM_ERRORS * self.error


def shift(lines: Sequence[Mapping[str, float]], names: tuple[str, str]) -> Shift | None:
    """From the first steps. names: of the mean over prompts and of its standard error.

    None: too few steps, or no such numbers.
    """
    told = _told(lines, names)
    return _difference(told, names, windows(told[0]["num_prompts"])[0]) if told else None


def gross_shift(lines: Sequence[Mapping[str, float]], names: tuple[str, str]) -> Shift | None:
    """From the first step, the base model's; None also where the change is not gross. names: as in `shift`."""
    told = _told(lines, names)
    found = _difference(told, names, 1) if told else None
    least = GROSS_RISE if names is TRUNCATED else np.log(GROSS_FACTOR)
    return found if found and found.significant and abs(found.change) > least else None


def _told(lines: Sequence[Mapping[str, float]], names: tuple[str, str]) -> list[Mapping[str, float]]:
    return [line for line in lines if names[1] in line]


def windows(num_prompts: float) -> tuple[int, int]:
    """How many first and recent steps are compared, of runs of two or more prompts a step."""
    enough = math.ceil(MIN_DEGREES / (num_prompts - 1))
    return max(BASELINE_STEPS, 2 * enough), max(RECENT_STEPS, enough)


def _difference(told: Sequence[Mapping[str, float]], names: tuple[str, str], num_first: int) -> Shift | None:
    mean, error = names
    num_recent = windows(told[0]["num_prompts"])[1]
    if len(told) < num_first + num_recent:
        return None
    first, recent = told[:num_first], told[-num_recent:]
    before, now = (np.array([line[mean] for line in part]) for part in (first, recent))
    spread = before.var(ddof=1) if num_first > 1 else 0.0
    noise = sum(max(spread, np.mean([line[error] ** 2 for line in part])) / len(part) for part in (first, recent))
    return Shift(float(before.mean()), float(now.mean()), float(np.sqrt(noise)))
