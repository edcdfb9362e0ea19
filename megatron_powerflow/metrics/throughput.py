"""How long did each phase of a step take, and how much memory did it need? Wall clock of the rank that writes.

Left out: FLOPs and utilisation.
"""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch


class PhaseClock:
    """Adds up the seconds of each phase: `with clock("rollout"): ...`. `take` returns them and starts anew."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        _wait_for_device()
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait_for_device()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Returns the seconds of each phase since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken


def throughput(
    seconds: dict[str, float], num_prompt_tokens: float, num_response_tokens: float, num_trained_tokens: float
) -> dict[str, float]:
    """Returns the seconds of each phase, and tokens per second over all ranks.

    The rollout phase counts response tokens, the reference all of the step's tokens, the update all that it trains on,
    those of earlier steps included. tokens_per_second: response tokens over the seconds
    of all phases.
    """
    total = sum(seconds.values())
    values = {f"{phase}_seconds": value for phase, value in seconds.items()} | {"step_seconds": total}
    values["tokens_per_second"] = num_response_tokens / total
    tokens = {
        "rollout": num_response_tokens,
        "reference": num_prompt_tokens + num_response_tokens,
        "update": num_trained_tokens,
    }
    for phase, count in tokens.items():
        if seconds.get(phase):
            values[f"{phase}_tokens_per_second"] = count / seconds[phase]
    return values


def peak_memory_bytes() -> int:
    """Returns the most GPU memory that this process's tensors took; without a GPU, the most resident host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
