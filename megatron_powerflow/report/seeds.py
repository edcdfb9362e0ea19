"""What do several seeds of one arm say together? Means with standard errors; curves with bands.

A standard error over n seeds is the sample standard deviation (n - 1) over sqrt(n). One seed has none: then, where the
evaluation says its own, over its questions, that one is given and called so.

Left out: confidence intervals; with two or three seeds they would promise more than is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np

MAX_POINTS = 80  # of a drawn curve; longer ones are averaged in bins of equal width


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimate is a mean over `num_seeds` seeds with its standard error. over: what `se` is over, "seeds" or
    "questions"; both are None where the error is unknown."""

    mean: float
    se: float | None
    num_seeds: int
    over: Literal["seeds", "questions"] | None


def estimate(values: Sequence[float], own_se: Sequence[float | None] = ()) -> Estimate | None:
    """Average one value per seed. own_se: the standard error that each measurement states, used where there is one
    seed.

    Returns None when there are no values.
    """
    if not values:
        return None
    if len(values) > 1:
        return Estimate(
            float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5), len(values), "seeds"
        )
    known = own_se[0] if own_se else None
    return Estimate(float(values[0]), known, 1, None if known is None else "questions")


def error_lengths(
    means: Sequence[float] | np.ndarray, errors: Sequence[float | None] | np.ndarray, *, share: bool
) -> np.ndarray:
    """Return, as [2, n] fp64, how far an error bar goes below and above each mean.

    share: the values lie in 0 to 1, and bars end there. An error of None gives no bar.
    """
    middle, length = np.asarray(means, float), np.array([error or 0.0 for error in errors])
    if not share:
        return np.stack([length, length])
    return np.stack([np.minimum(length, middle), np.minimum(length, 1.0 - middle)]).clip(min=0.0)


@dataclass(frozen=True, slots=True)
class Band:
    """A band is a curve over seeds: mean, lowest and highest seed at each step, and the standard error `se`, which
    is 0 where only one seed is left. All arrays are [n] fp64."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    se: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


def band(per_seed: Sequence[Mapping[int, float]], *, max_points: int = MAX_POINTS) -> Band | None:
    """Average step -> value maps, one per seed, at each step over the seeds that have it. Returns None when no seed has
    a value.

    With more than `max_points` steps each seed is averaged within bins of steps first, so a band is that of bin
    means.
    """
    steps = sorted({step for series in per_seed for step in series})
    if not steps:
        return None
    width = ceil((steps[-1] - steps[0] + 1) / max_points) if len(steps) > max_points else 1
    bins: dict[int, list[list[float]]] = {}
    steps_by_bin: dict[int, list[int]] = {}
    for series in per_seed:
        values_by_bin: dict[int, list[float]] = {}
        for step, value in series.items():
            values_by_bin.setdefault((step - steps[0]) // width, []).append(value)
        for bin_index, values in values_by_bin.items():
            bins.setdefault(bin_index, []).append(values)
    for step in steps:
        steps_by_bin.setdefault((step - steps[0]) // width, []).append(step)
    bin_order = sorted(bins)
    seeds = [[float(np.mean(values)) for values in bins[bin_index]] for bin_index in bin_order]
    return Band(
        steps=np.array([np.mean(steps_by_bin[bin_index]) for bin_index in bin_order]),
        mean=np.array([np.mean(values) for values in seeds]),
        low=np.array([min(values) for values in seeds]),
        high=np.array([max(values) for values in seeds]),
        se=np.array([np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0 for values in seeds]),
    )
