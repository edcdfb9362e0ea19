"""How long are a step's responses, and how sure is that, when rollouts of one prompt count as one?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def length_statistics(every: Mapping[str, np.ndarray], responses_per_prompt: int) -> dict[str, float]:
    """every: columns [B] of all rollouts, dropped ones included. Logarithms are natural, of tokens.

    `_error`: the standard error over prompts, sd of the prompts' means / sqrt(num_prompts); NaN for one prompt.
    """
    _, place, counts = np.unique(
        every["rollout_index"] // responses_per_prompt, return_inverse=True, return_counts=True
    )
    log_lengths = np.bincount(place, np.log(np.maximum(every["num_response_tokens"], 1.0))) / counts
    truncated = np.bincount(place, every["truncated"]) / counts
    return {
        "num_prompts": float(len(counts)),
        "truncated_fraction_error": _standard_error(truncated),
        "response_log_length_mean": log_lengths.mean(),
        "response_log_length_error": _standard_error(log_lengths),
    }


def _standard_error(means: np.ndarray) -> float:
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else np.nan
