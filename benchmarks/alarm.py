"""How often does the length alarm ring on a run in which nothing happens? Log-normal lengths, stationary.

Prompts differ (sd between) and so do a prompt's responses (sd within); the limit cuts the share that is named.
"""

from __future__ import annotations

import argparse

import numpy as np

from megatron_powerflow.metrics.alarm import Thresholds, ringing
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

    spread = np.hypot(between, within)
    quantiles = np.random.default_rng(0)
    pool = quantiles.standard_t(tails, (2, 10**5)) / np.sqrt(3) if tails else quantiles.normal(size=(2, 10**5))
    limit = np.quantile(between * pool[0] + within * pool[1], 1 - cut) if spread else np.inf
    index = np.arange(prompts * responses)
    logs = between * draw(steps, prompts, 1) + within * draw(steps, prompts, responses)
    lines: list[dict[str, float]] = []
    for step in logs.reshape(steps, -1):
        truncated = (step > limit).astype(float)
        every = {
            "rollout_index": index,
            "truncated": truncated,
            "num_response_tokens": np.round(300 * np.exp(np.minimum(step, limit))),
        }
        told = length_statistics(every, responses)
        lines.append(told | {"truncated_fraction": truncated.mean(), "num_rollouts_kept": 1.0})
        if ringing(lines, DEFAULTS):
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--case", choices=CASES, action="append")
    asked = parser.parse_args()
    for name in asked.case or CASES:
        count = sum(rings(CASES[name], seed) for seed in range(asked.runs))
        print(f"{name}: {count} of {asked.runs} stationary runs ring", flush=True)


if __name__ == "__main__":
    main()
