"""How often does the length alarm ring on a run in which nothing happens? Log-normal lengths, stationary.

Prompts differ (sd between) and so do a prompt's responses (sd within); the limit cuts the share that is named.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache

import numpy as np

from megatron_powerflow.metrics.alarm import Thresholds, raised_alarms
from megatron_powerflow.metrics.length_shift import windows
from megatron_powerflow.metrics.prompt_statistics import length_statistics

DEFAULTS = Thresholds(0.03, 1.3, 0.5, 10.0, None, 3)
# prompts, responses, steps, sd between, sd within, share cut, degrees of freedom of the tails (0: normal)
CASES = {
    "512 x 500": (32, 16, 500, 0.6, 0.4, 0.003, 0),
    "64 (16 x 4) x 200": (16, 4, 200, 0.6, 0.4, 0.003, 0),
    "64 (8 x 8) x 200": (8, 8, 200, 0.6, 0.4, 0.003, 0),
    "64 (8 x 8) x 200, .3 cut": (8, 8, 200, 0.6, 0.4, 0.3, 0),
    "64 (8 x 8) x 200, heavy tails": (8, 8, 200, 0.6, 0.4, 0.003, 3),
    "64 (8 x 8) x 200, between 1.0, within .2": (8, 8, 200, 1.0, 0.2, 0.05, 0),
    "512 x 500, .3 cut": (32, 16, 500, 0.6, 0.4, 0.3, 0),
}


def rings(case: tuple, seed: int) -> bool:
    """Whether the length alarm or the short one rings at any step of one simulated run."""
    prompts, responses, steps, between, within, cut, tails = case
    generator = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return generator.standard_t(tails, shape) / np.sqrt(3) if tails else generator.normal(size=shape)

    logs = between * draw(steps, prompts, 1) + within * draw(steps, prompts, responses)
    limit = limit_of(between, within, cut, tails)
    truncated, tokens = (logs > limit).astype(float), np.round(300 * np.exp(np.minimum(logs, limit)))
    # [steps, prompts]: what `length_statistics` makes of each step, for all at once
    shares, log_lengths = truncated.mean(-1), np.log(np.maximum(tokens, 1.0)).mean(-1)
    columns = {
        "num_prompts": np.full(steps, float(prompts)),
        "num_rollouts_kept": np.ones(steps),
        "truncated_fraction": shares.mean(1),
        "truncated_fraction_error": shares.std(1, ddof=1) / np.sqrt(prompts),
        "response_log_length_mean": log_lengths.mean(1),
        "response_log_length_error": log_lengths.std(1, ddof=1) / np.sqrt(prompts),
    }
    lines = [dict(zip(columns, map(float, row), strict=True)) for row in zip(*columns.values(), strict=True)]
    every = {"truncated": truncated[0].ravel(), "num_response_tokens": tokens[0].ravel()}
    told = length_statistics(every | {"rollout_index": np.arange(prompts * responses)}, responses)
    assert all(np.isclose(lines[0][name], value) for name, value in told.items())
    return any(raised_alarms(lines[: step + 1], DEFAULTS) for step in far_enough(columns))


def far_enough(columns: dict[str, np.ndarray]) -> np.ndarray:
    """The steps whose recent means are as far away as an alarm asks for; only these can ring, if not all of them do."""
    num_first, num_recent = windows(columns["num_prompts"][0])
    found = np.zeros(len(columns["num_prompts"]), bool)
    bounds = {
        "truncated_fraction": (DEFAULTS.truncated_rise, np.inf),
        "response_log_length_mean": (np.log(DEFAULTS.length_rise), -np.log(DEFAULTS.length_fall)),
    }
    for name, (rise, fall) in bounds.items():
        recent = np.convolve(columns[name], np.ones(num_recent) / num_recent, "valid")
        for before in (columns[name][:num_first].mean(), columns[name][0]):
            found[num_recent - 1 :] |= (recent - before > rise) | (before - recent > fall)
    return np.flatnonzero(found)


@cache
def limit_of(between: float, within: float, cut: float, tails: int) -> float:
    """The log length above which the share `cut` of all responses lies."""
    generator = np.random.default_rng(0)
    pool = generator.standard_t(tails, (2, 10**6)) / np.sqrt(3) if tails else generator.normal(size=(2, 10**6))
    return float(np.quantile(between * pool[0] + within * pool[1], 1 - cut))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--case", choices=CASES, action="append")
    asked = parser.parse_args()
    for name in asked.case or CASES:
        count, end = 0, "\r" if sys.stderr.isatty() else "\n"
        for seed in range(asked.runs):
            count += rings(CASES[name], seed)
            if not (seed + 1) % 100:
                print(f"{name}: {seed + 1} of {asked.runs} runs, {count} rang", end=end, file=sys.stderr, flush=True)
        print(f"{name}: {count} of {asked.runs} stationary runs ring", flush=True)


if __name__ == "__main__":
    main()
