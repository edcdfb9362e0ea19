"""How long are a step's responses, and how large is the error of that mean, when the prompt is the unit?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def length_statistics(every: Mapping[str, np.ndarray], responses_per_prompt: int) -> dict[str, float]:
    """Returns means over a step's prompts of the truncated share and the log length, with their standard errors.

    every: columns [B] of all rollouts, dropped ones included. Logarithms are natural, of the length in tokens.
    `..._error`: the standard deviation of the prompts' means / sqrt(num_prompts); NaN for one prompt.
    """
    _, prompt_index, counts = np.unique(
        every["rollout_index"] // responses_per_prompt, return_inverse=True, return_counts=True
    )
    log_lengths = np.bincount(prompt_index, np.log(np.maximum(every["num_response_tokens"], 1.0))) / counts
    truncated = np.bincount(prompt_index, every["truncated"]) / counts
    return {
        "num_prompts": float(len(counts)),
        "truncated_fraction_error": _standard_error(truncated),
        "response_log_length_mean": log_lengths.mean(),
        "response_log_length_error": _standard_error(log_lengths),
    }


def _standard_error(means: np.ndarray) -> float:
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else np.nan
