"""Are the responses lengthening out of hand? An alarm on what moves first: the truncated share and the long tail.

A repetition trap springs in a few dozen steps; accuracy falls with it, these two before it. A pure function of the
lines of metrics.jsonl, so a resumed run raises the same alarm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

BASELINE_STEPS = 10
RECENT_STEPS = 5
TRUNCATED_RISE = 0.03  # of the share, beyond its noise
LONG_TAIL_RISE = 1.3  # factor on the 95th percentile of the lengths


def length_alarm(lines: Sequence[Mapping[str, float]]) -> str | None:
    """What rings, in words; None while all is well. lines: of every step so far, oldest first."""
    if len(lines) < BASELINE_STEPS + RECENT_STEPS:
        return None
    before, now = lines[:BASELINE_STEPS], lines[-RECENT_STEPS:]

    def mean(part: Sequence[Mapping[str, float]], name: str) -> float:
        return float(np.mean([line[name] for line in part]))

    was, is_now = mean(before, "truncated_fraction"), mean(now, "truncated_fraction")
    noise = 3.0 * np.sqrt(was * (1.0 - was) / mean(now, "num_rollouts") / RECENT_STEPS)
    if is_now > was + TRUNCATED_RISE + noise:
        return f"truncated_fraction rose from {was:.3f} to {is_now:.3f}"
    was, is_now = mean(before, "response_length_p95"), mean(now, "response_length_p95")
    if is_now > LONG_TAIL_RISE * was:
        return f"response_length_p95 rose from {was:.0f} to {is_now:.0f} tokens"
    return None
