"""What do the rollouts of a step amount to? Every metric from one table, each with its denominator.

The table has a row per rollout of the whole step (all ranks, sorted), so a metric is the same number under every
layout, a quantile is a quantile of all rollouts, and no mean of means exists.

Left out: collecting the rows (`training/update.py`), times (`throughput.py`), writing (`writers.py`).
"""

from __future__ import annotations

import numpy as np

from megatron_powerflow.records import ROLLOUT_COLUMNS

RESIDUAL_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_LOG_PROB = 1e-3  # above 0 by more than rounding: a broken kernel


def reduce_rollouts(rows: np.ndarray, *, responses_per_prompt: int, clip_epsilon: float | None) -> dict[str, float]:
    """rows: [B, len(ROLLOUT_COLUMNS)] fp64 -> metrics. Natural logarithms; lengths in tokens.

    Means run over kept rollouts unless the name says token or prompt. What does not exist is absent, never NaN.
    Raises FloatingPointError when a log-prob is above 0: the numbers of such a step mean nothing.
    """
    every = {name: rows[:, place] for place, name in enumerate(ROLLOUT_COLUMNS)}
    highest = every["max_log_prob"].max(initial=-np.inf)
    if highest > MAX_LOG_PROB:
        raise FloatingPointError(f"a token has log-prob {highest:.4g}; probabilities end at 1, the scorer is broken")
    num_tokens = every["num_response_tokens"].sum()
    values = {
        "num_rollouts": float(len(rows)),
        "num_rollouts_kept": float(every["kept"].sum()),
        "num_prompt_tokens": float(every["num_prompt_tokens"].sum()),
        "num_response_tokens": float(num_tokens),
        # over all rollouts
        "response_length_mean": every["num_response_tokens"].mean(),
        "response_length_max": every["num_response_tokens"].max(),
        "response_length_p95": np.quantile(every["num_response_tokens"], 0.95),
        "truncated_fraction": every["truncated"].mean(),
        "eos_fraction": 1.0 - every["truncated"].mean(),
        "boxed_rate": every["boxed"].mean(),
        # over response tokens of all rollouts
        "policy_entropy": -every["sequence_log_prob"].sum() / num_tokens,  # sampled estimate, nats per token
        "ref_log_prob_mean": every["ref_sequence_log_prob"].sum() / num_tokens,
        "sampler_gap_mean": every["sampler_gap_sum"].sum() / num_tokens,  # |scorer - sampler| per token
        "sampler_gap_max": every["sampler_gap_max"].max(),
        # over all rollouts: |S - S_sampler|, what a sequence weight would feel
        "sampler_gap_sequence_mean": np.abs(every["sequence_log_prob"] - every["rollout_sequence_log_prob"]).mean(),
    }
    kept = {name: column[every["kept"] > 0] for name, column in every.items()}
    if len(kept["kept"]):
        values |= _objective_metrics(kept, responses_per_prompt, clip_epsilon)
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def _objective_metrics(kept: dict[str, np.ndarray], responses_per_prompt: int, clip_epsilon: float | None) -> dict:
    """Means over kept rollouts; `prompt` in a name: over prompts."""
    residual, weight, ratio = kept["residual"], kept["weight"], kept["ratio"]
    prompts = kept["rollout_index"] // responses_per_prompt
    head = _per_prompt(kept["log_z"], prompts)
    estimate = _per_prompt(kept["log_z"] - residual, prompts)  # minus the mean of (S - alpha S_ref)/n - alpha psi
    values = {
        "loss": (weight * residual**2).mean(),
        "residual_mean": residual.mean(),
        "residual_std": residual.std(),
        **{f"residual_p{int(100 * q):02d}": np.quantile(residual, q) for q in RESIDUAL_QUANTILES},
        "weighted_residual_mean": (weight * residual).mean(),  # E[w delta]: 0 where log Z' is stationary
        "log_z_mean": head.mean(),
        "log_z_std": head.std(),
        "group_log_z_mean": estimate.mean(),
        "group_log_z_std": estimate.std(),
        "weight_mean": weight.mean(),
        "ratio_mean": ratio.mean(),
        "psi_mean": kept["psi"].mean(),
    }
    if clip_epsilon is not None:
        values["clip_fraction"] = (np.abs(ratio - 1.0) > clip_epsilon).mean()
    return values


def _per_prompt(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Mean over the kept rollouts of each prompt."""
    _, place = np.unique(prompts, return_inverse=True)
    return np.bincount(place, values) / np.bincount(place)
