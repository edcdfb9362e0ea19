"""Does a response go round in a loop, and what does the loop cost the base model?

A loop repeats one run of tokens, its turn, over and over until the limit stops it. Ordinary mathematics repeats itself
as well: 0.333333, |---|---|---|, a matrix of zeros, a row of dots. So a repetition counts as a loop only with many
turns and where it fills a fair part of the longest response: at least 615 tokens where the limit is 3,072, and 8 where
it is 40. A loop that begins in the last fifth of a response is not recognised; loops that matter begin anywhere and go
on to the limit.

Left out: what the target makes of a loop (`trap.py`), n-grams that come again (`repetition.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_PERIOD = 64  # tokens of one turn: a sentence or two
MIN_TURNS = 8
LIMIT_SHARE = 5  # a loop has at least max_response_tokens / LIMIT_SHARE tokens


@dataclass(frozen=True, slots=True)
class Loop:
    """Describes the longest repetition in a response, and its cost under the base model.

    num_tokens: its length, first turn included. nats: -log p_base per token once it has settled, a mean over its second
    half. entry_nats: what the whole repetition costs beyond num_tokens * nats, 0 at least.
    """

    num_tokens: int
    nats: float
    entry_nats: float


def min_loop_tokens(max_response_tokens: int) -> int:
    """Returns the length in tokens from which on a repetition is a loop, in a run with this limit."""
    return max(MIN_TURNS, -(-max_response_tokens // LIMIT_SHARE))


def find_loop(tokens: np.ndarray, ref_log_probs: np.ndarray, *, min_tokens: int) -> Loop | None:
    """Returns the longest stretch of `tokens` that repeats a turn of 1 to 64 tokens at least 8 times; None without one.

    tokens: [n]; ref_log_probs: [n] of the base model, nats. The stretch has min_tokens or more. Of several turns that
    give the same stretch the shortest counts.
    """
    best = (0, 0, 0)  # tokens, -period, start
    for period in range(1, min(MAX_PERIOD, len(tokens) // MIN_TURNS) + 1):
        needed = max(MIN_TURNS * period, min_tokens) - period
        same = tokens[period:] == tokens[:-period]
        if np.count_nonzero(same) < needed:
            continue
        start, length = _longest_run(same)
        if length >= needed:
            best = max(best, (length + period, -period, start))
    num_tokens, start = best[0], best[2]
    if not num_tokens:
        return None
    costs = -ref_log_probs[start : start + num_tokens].astype(np.float64)
    nats = float(costs[num_tokens // 2 :].mean())  # a loop gets cheaper as it goes on: the limit prolongs its end
    return Loop(num_tokens, nats, max(float(costs.sum()) - num_tokens * nats, 0.0))


def _longest_run(flags: np.ndarray) -> tuple[int, int]:
    """Returns (start, length) of the longest run of True; (0, 0) without one."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    if not len(edges):
        return 0, 0
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    longest = int(lengths.argmax())
    return int(starts[longest]), int(lengths[longest])
