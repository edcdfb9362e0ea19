"""Does a response repeat itself, how much does it cost the base model, and will the target reward it?

Length-aware trajectory balance has the fixed point p_base^alpha exp(-lambda n), lambda < 0 for alpha > 1: a bonus of
|lambda| nats a token. A loop that costs r nats a token under p_base, once c nats have been paid to enter it, gains
|lambda| - alpha r on each token, so at a cap of N tokens it beats an ordinary response when

    margin = N (|lambda| - alpha r) - alpha c > 0        (with a tilt cap M: M |lambda| - alpha (N r + c))

One-mode estimate: the many ways into a loop and the worth of ordinary responses are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_PERIOD = 8  # tokens of one turn
MIN_TURNS = 3
MIN_LOOP_TOKENS = 6


@dataclass(frozen=True, slots=True)
class Loop:
    """num_tokens: of the longest loop in a response, first turn included. nats: -log p_base a token after the first
    turn. entry_nats: what the first turn costs beyond that."""

    num_tokens: int
    nats: float
    entry_nats: float


def find_loop(tokens: np.ndarray, ref_log_probs: np.ndarray) -> Loop | None:
    """The longest stretch of [n] tokens that repeats a turn of 1 to 8 tokens at least 3 times; None without one."""
    if len(tokens) < MIN_LOOP_TOKENS:
        return None
    best = (0, 0, 0)  # tokens, -period, start
    for period in range(1, min(MAX_PERIOD, len(tokens) // MIN_TURNS) + 1):
        same = tokens[period:] == tokens[:-period]
        start, length = _longest_run(same)
        if length + period >= max(MIN_TURNS * period, MIN_LOOP_TOKENS):
            best = max(best, (length + period, -period, start))
    num_tokens, period, start = best[0], -best[1], best[2]
    if not num_tokens:
        return None
    nats = -float(ref_log_probs[start + period : start + num_tokens].mean())
    entry = -float(ref_log_probs[start : start + period].sum()) - period * nats
    return Loop(num_tokens, nats, max(entry, 0.0))


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """(start, length) of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    if not len(edges):
        return 0, 0
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(starts[longest]), int(lengths[longest])


def trap_margin(
    loop_nats: np.ndarray,
    entry_nats: np.ndarray,
    *,
    alpha: float,
    tilt: float,
    max_response_tokens: int,
    tilt_cap: int | None,
) -> np.ndarray:
    """[loops] nats by which a loop of max_response_tokens beats an ordinary response under the target; see above.
    tilt: -lambda."""
    counted = max_response_tokens if tilt_cap is None else min(tilt_cap, max_response_tokens)
    return counted * tilt - alpha * (max_response_tokens * loop_nats + entry_nats)


def estimate_tilt(
    sequence_log_prob: np.ndarray, ref_sequence_log_prob: np.ndarray, lengths: np.ndarray, alpha: float
) -> float:
    """-lambda by importance sampling from the policy: the root of mean exp(alpha S_ref - S + tilt * n) = 1.

    [B] each, over all prompts together. Noisy and too large in the beginning, good once the policy is near its target.
    """
    energy = alpha * ref_sequence_log_prob - sequence_log_prob
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        exponent = energy + middle * lengths
        top = exponent.max()
        total = top + np.log(np.exp(exponent - top).mean())
        low, high = (low, middle) if total > 0 else (middle, high)
    return (low + high) / 2


def repeated_share(tokens: Sequence[int], n: int = 4) -> float:
    """Share of a response's n-grams that it has had before; 0 when it has fewer than two."""
    grams = ngrams(tokens, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float:
    """Distinct n-grams over all n-grams of a prompt's responses together; 0 when there are none."""
    grams = [gram for response in responses for gram in ngrams(response, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def ngrams(items: Sequence, n: int) -> list[tuple]:
    """All runs of n items, overlapping, in order."""
    return list(zip(*(items[i:] for i in range(n)), strict=False))
