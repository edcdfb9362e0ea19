"""Do the layout and one process compute the same? What both have seen, number by number; arithmetic only.

Each quantity has a bound: some ten times the largest difference that rounding made in the 15 layouts of ten families
that `benchmarks/proofs.py` tries, and three times what it makes where an objective enlarges it (intuitor's advantages).
What is copied, not computed, must be equal bit for bit.

Left out: reading the files (`read_seen.py`), words and tables (`report.py`). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from megatron_powerflow.prove.job import SAVED
from megatron_powerflow.prove.read_seen import SeenPart
from megatron_powerflow.prove.small_config import STEPS
from megatron_powerflow.records import ROLLOUT_COLUMNS

LOG_PROB = 5e-5  # nats a token
DRAWN_SHARE = 0.25  # of 4 responses or more: a draw at the edge between two tokens may fall on either side
LOSS = 3e-5
ROW = 1e-4
GRADIENT_NORM = 3e-5
GRADIENT = 5e-5
CHANGE = 2e-4
SMALL_GRADIENT = 1e-3  # of the largest tensor's norm: what is smaller is compared with this
# what a rollout's row says of the model, the loss and the update
COLUMNS = (
    "sequence_log_prob",
    "old_sequence_log_prob",
    "ref_sequence_log_prob",
    "loss_term",
    "log_z",
    "psi",
    "reward",
    "residual",
    "advantage",
    "weight",
    "ratio",
    "kept",
)
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Line:
    """A quantity that was compared. largest: the largest difference; 0: equal bit for bit. bound: up to which it is
    rounding. where: the place of the largest difference, or what was compared."""

    name: str
    unit: str
    largest: float
    bound: float
    where: str = ""

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound; NaN is not."""
        return self.largest <= self.bound


def compare(alone: SeenPart, layout: SeenPart, resumed: SeenPart | None, before: Arrays, export: Arrays) -> list[Line]:
    """Return every line of the proof.

    resumed: None where that part failed. before: the small model's weights, by HF name. export: those of the layout's
    export.
    """
    a, b = alone.tensors, layout.tensors
    return [
        _log_probs(a, b),
        _drawn(a, b),
        _drawn_gap(b),
        _losses(a, b),
        _rows(a, b),
        _gradient_norms(a, b),
        _gradients(_below("gradient", b), _below("gradient", a)),
        _changes(a, b, before),
        _replicas(layout),
        *([] if resumed is None else [_resumed(layout, resumed)]),
        _equal("export", export, _below(f"weights/{STEPS - 1}", b), "the layout's weights"),
    ]


def _log_probs(a: Arrays, b: Arrays) -> Line:
    ours, theirs = _below("log_probs", b), _below("log_probs", a)
    found = (
        (float(np.abs(ours[key] - value).max()) if _fits(ours.get(key), value) else math.inf, f"rollout {key}")
        for key, value in theirs.items()
    )
    return Line("log-probs of responses", "nats a token", *_worst(found, LOG_PROB))


def _drawn(a: Arrays, b: Arrays) -> Line:
    """Compare the responses that the layout draws with those that one process has drawn, of the first step."""
    ours, theirs = _below("drawn", b), _below("drawn", a)
    other = [key for key, value in theirs.items() if not np.array_equal(ours.get(key, ()), value)]
    share = len(other) / len(theirs) if ours.keys() == theirs.keys() else math.inf
    return Line("responses that it draws", "share", share, DRAWN_SHARE, f"{len(theirs)} responses")


def _drawn_gap(b: Arrays) -> Line:
    found = ((float(value[0]), f"replica {key}") for key, value in _below("drawn_gap", b).items())
    return Line("sampler against scorer", "nats a token", *_worst(found, LOG_PROB))


def _losses(a: Arrays, b: Arrays) -> Line:
    """Compare the means of the losses' terms, in terms of their mean size: those of a policy gradient cancel."""
    found = []
    for step in range(STEPS):
        ours, theirs = _kept_terms(b[f"rows/{step}"]), _kept_terms(a[f"rows/{step}"])
        apart = _mean(ours) - _mean(theirs)
        found.append((_share(abs(apart), _mean(np.abs(theirs))), f"step {step + 1}"))
    return Line("loss", "relative", *_worst(found, LOSS))


def _kept_terms(rows: np.ndarray) -> np.ndarray:
    """Return what the loss of a step is the mean of. rows: [B, len(ROLLOUT_COLUMNS)]."""
    term, kept = (rows[:, ROLLOUT_COLUMNS.index(name)] for name in ("loss_term", "kept"))
    return term[kept > 0]


def _rows(a: Arrays, b: Arrays) -> Line:
    """Compare what each step says of each rollout, relative to the number, or to the column's root mean square: an
    advantage is a small number over a small deviation."""
    found = []
    for step in range(STEPS):
        ours, theirs = b[f"rows/{step}"], a[f"rows/{step}"]
        if not _fits(ours, theirs):
            found.append((math.inf, f"{len(ours)} rollouts in step {step + 1}, not {len(theirs)}"))
            continue
        for name in COLUMNS:
            x, y = (rows[:, ROLLOUT_COLUMNS.index(name)] for rows in (ours, theirs))
            usual = math.sqrt(_mean(np.square(y[~np.isnan(y)])))
            apart = np.abs(x - y) / np.maximum(np.abs(y), max(usual, 1.0))
            found.append((float(np.where(np.isnan(x) & np.isnan(y), 0.0, apart).max()), f"{name} of step {step + 1}"))
    return Line("residuals, weights, log Z'", "relative", *_worst(found, ROW))


def _gradient_norms(a: Arrays, b: Arrays) -> Line:
    found = [
        (_share(abs(float(x - y)), float(y)), f"step {step + 1}")
        for step in range(STEPS)
        for x, y in zip(b[f"gradient_norms/{step}"], a[f"gradient_norms/{step}"], strict=True)
    ]
    return Line("gradient norm", "relative", *_worst(found, GRADIENT_NORM))


def _gradients(ours: Arrays, theirs: Arrays) -> Line:
    largest = max(_norm([value]) for value in theirs.values())
    found = (
        (
            _norm([_minus(ours.get(name), value)]) / max(_norm([value]), SMALL_GRADIENT * largest)
            if largest
            else math.inf,
            name,
        )
        for name, value in theirs.items()
    )
    return Line(f"gradients, {len(theirs)} tensors", "relative norm", *_worst(found, GRADIENT))


def _changes(a: Arrays, b: Arrays, before: Arrays) -> Line:
    """Compare what each step has made of all weights together: Adam divides small numbers by small ones, so that
    single weights with no gradient to speak of may differ."""
    found = []
    for step in range(STEPS):
        ours, theirs = _below(f"weights/{step}", b), _below(f"weights/{step}", a)
        moved = _norm([theirs[name] - value for name, value in before.items()])
        apart = _norm([_minus(ours.get(name), theirs[name]) for name in before])
        found.append((_share(apart, moved), f"after step {step + 1}"))
    return Line("change of the weights", "relative norm", *_worst(found, CHANGE))


def _replicas(layout: SeenPart) -> Line:
    """Count the parts of the model that ranks hold which should be alike, and are not."""
    other = [name for name, digests in layout.digests.items() if len(set(digests)) > 1]
    copies = sum(len(digests) > 1 for digests in layout.digests.values())
    where = other[0] if other else f"{copies} on several ranks"
    return Line("copies of the weights", "parts", float(len(other)), 0.0, where)


def _resumed(layout: SeenPart, resumed: SeenPart) -> Line:
    """Compare the steps behind the checkpoint with those of the unbroken run."""
    wanted = {
        name: value
        for name, value in layout.tensors.items()
        if name.split("/")[0] in ("rows", "gradient_norms", "weights") and int(name.split("/")[1]) >= SAVED
    }
    return _equal("resumed after step 2", resumed.tensors, wanted, f"step {STEPS} as without a break")


def _equal(name: str, ours: Arrays, wanted: Arrays, what: str) -> Line:
    """Compare bit for bit."""
    other = sorted(ours.keys() ^ wanted.keys()) or [
        key for key, value in wanted.items() if ours[key].tobytes() != value.tobytes()
    ]
    return Line(name, "tensors", float(len(other)), 0.0, other[0] if other else what)


def _below(prefix: str, arrays: Arrays) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix + "/"): value for name, value in arrays.items() if name.startswith(prefix + "/")}


def _fits(ours: np.ndarray | None, theirs: np.ndarray) -> bool:
    return ours is not None and ours.shape == theirs.shape


def _minus(ours: np.ndarray | None, theirs: np.ndarray) -> np.ndarray:
    """Return the difference; infinite where there is none to make."""
    return ours.astype(np.float64) - theirs if ours is not None and _fits(ours, theirs) else np.full(1, math.inf)


def _norm(arrays: Iterable[np.ndarray]) -> float:
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else 0.0


def _share(part: float, whole: float) -> float:
    """Return part / whole; infinite where there is nothing to compare with."""
    return part / whole if whole else math.inf


def _worst(found: Iterable[tuple[float, str]], bound: float) -> tuple[float, float, str]:
    """Return (largest difference, bound, where); NaN is larger than any number, and so is nothing at all."""
    largest, where = max(found, key=lambda item: (math.isnan(item[0]), item[0]), default=(math.inf, "nothing was seen"))
    return largest, bound, where
