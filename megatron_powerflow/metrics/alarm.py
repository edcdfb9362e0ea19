"""Does something go wrong in a run that a user should know of at once? Five alarms, functions of metrics.jsonl's lines.

Since the lines are their only input, a resumed run raises the same alarms. The tests on lengths are in
`length_shift.py`.

Left out: what is done about an alarm (`run_output.py`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_powerflow.metrics.length_shift import LOG_LENGTH, TRUNCATED, Shift, gross_shift, shift

ALARMS = ("length", "short", "loss", "sampler_gap", "nothing_kept")
LOSS_BASELINE_STEPS = 10
LOSS_RECENT_STEPS = 5
LOSS_FLOOR = 1e-3  # nats squared; a smaller loss counts as this one, as ten times nearly nothing is no alarm

Lines = Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Holds the bounds of the config's section `alarm`.

    sampler_gap: nats per token; None where the run has no such bound.
    """

    truncated_rise: float
    length_rise: float
    length_fall: float
    loss_growth: float
    sampler_gap: float | None
    nothing_kept_steps: int


def raised_alarms(lines: Lines, thresholds: Thresholds) -> dict[str, str]:
    """Returns {name of an alarm: what was measured, in words} of the alarms that hold after the last of `lines`.

    lines: of metrics.jsonl, every step so far, oldest first.
    """
    messages = {
        "length": _length(lines, thresholds),
        "short": _short(lines, thresholds),
        "loss": _loss(lines, thresholds),
        "sampler_gap": _sampler_gap(lines, thresholds),
        "nothing_kept": _nothing_kept(lines, thresholds),
    }
    return {name: message for name, message in messages.items() if message is not None}


def has_diverged(lines: Lines, thresholds: Thresholds) -> bool:
    """Whether the policy has become useless.

    It has where the loss has grown as its alarm says, or where the truncated share has risen by a half or more since
    the first step. (At a learning rate that is far too large the loss itself may end at 0, with one response for every
    prompt.)
    """
    cut = gross_shift(lines, TRUNCATED)
    return _loss(lines, thresholds) is not None or (cut is not None and cut.change > 0)


def _length(lines: Lines, thresholds: Thresholds) -> str | None:
    for cut in _shifts(lines, TRUNCATED):
        if cut.change > thresholds.truncated_rise:
            return f"truncated_fraction rose from {cut.before:.3f} to {cut.now:.3f}"
    for longer in _shifts(lines, LOG_LENGTH):
        if longer.change > math.log(thresholds.length_rise):
            return _lengths("rose", longer.before, longer.now)
    return None


def _short(lines: Lines, thresholds: Thresholds) -> str | None:
    for shorter in _shifts(lines, LOG_LENGTH):
        if shorter.change < math.log(thresholds.length_fall):
            return _lengths("fell", shorter.before, shorter.now)
    return None


def _shifts(lines: Lines, names: tuple[str, str]) -> list[Shift]:
    """Returns the significant shifts: since the first steps, and since the very first step."""
    return [moved for test in (shift, gross_shift) if (moved := test(lines, names)) and moved.significant]


def _lengths(verb: str, before: float, now: float) -> str:
    return f"the typical (geometric mean) length {verb} from {math.exp(before):.1f} to {math.exp(now):.1f} tokens"


def _loss(lines: Lines, thresholds: Thresholds) -> str | None:
    """Compares the median loss of the last steps with the median of the first ones at the same alpha.

    Where the median of the first steps is itself above loss_growth times the very first loss, the very first loss is
    the baseline: a learning rate that is far too large spoils every step behind it. The smallest of the first losses
    would be no baseline, since of ten noisy losses one is a fifth of the others. Only the squared residual has a scale:
    a rival's surrogate loss crosses 0, and there is no alarm for it.
    """
    if not lines or "residual_std" not in lines[-1]:
        return None
    alpha = lines[-1].get("alpha")
    losses = [
        line["loss"] for line in lines if "residual_std" in line and line.get("alpha") == alpha and "loss" in line
    ]
    first, recent = losses[:-LOSS_RECENT_STEPS][:LOSS_BASELINE_STEPS], losses[-LOSS_RECENT_STEPS:]
    if not first:
        return None
    usual, now = statistics.median(first), statistics.median(recent)
    before = max(first[0] if usual > thresholds.loss_growth * first[0] else usual, LOSS_FLOOR)
    return f"loss rose from {before:.3g} to {now:.3g}" if now > thresholds.loss_growth * before else None


def _sampler_gap(lines: Lines, thresholds: Thresholds) -> str | None:
    bound, gap = thresholds.sampler_gap, lines[-1].get("sampler_gap_mean") if lines else None
    if bound is None or gap is None or gap <= bound:
        return None
    return f"sampler_gap_mean is {gap:.3g} nats per token, above {bound:.3g}"


def _nothing_kept(lines: Lines, thresholds: Thresholds) -> str | None:
    last = lines[-thresholds.nothing_kept_steps :]
    if len(last) < thresholds.nothing_kept_steps or any(line.get("num_rollouts_kept") != 0 for line in last):
        return None
    return f"no response was kept in {len(last)} steps in a row"
