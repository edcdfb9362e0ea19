"""How are [tokens, vocabulary] cut into tiles, and how do sums over exp(logit - maximum) follow a new maximum?

Left out: computing a tile (`plain.py`, `triton.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Arithmetic(Protocol):
    """A module that computes tiles, with the functions and errors that `plain.py` describes."""

    @property
    def __name__(self) -> str: ...

    @property
    def FAILURES(self) -> tuple[type[Exception], ...]: ...

    def shard_sums(
        self,
        hidden: Tensor,
        weight: Tensor,
        columns: Tensor,
        temperature: float,
        everything: bool,
        max_logits: int,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def grad_logits(
        self,
        hidden: Tensor,
        weight: Tensor,
        temperature: float,
        columns: Tensor,
        log_normaliser: Tensor,
        grad: Tensor,
        grad_entropy: Tensor | None = None,
        entropy: Tensor | None = None,
        *,
        softcap: float | None = None,
    ) -> Tensor: ...


def tile_shape(num_tokens: int, max_logits: int) -> tuple[int, int]:
    """Return the (tokens, columns) of a tile of at most max_logits logits.

    The tile is a square where there are tokens enough, because a square reads the least per product.
    """
    num_rows = max(min(num_tokens, math.isqrt(max_logits)), 1)
    return num_rows, max(max_logits // num_rows, 1)


def slices(total: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover 0, ..., total - 1 in order."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def from_another_maximum(sums: Tensor, shift: Tensor) -> Tensor:
    """Return the sums of `plain.shard_sums` as they are for a maximum that is higher by -shift.

    sums: [2 or 4, ...]; shift: [...], the old maximum minus the new one, <= 0. Returns a new tensor of the sums' shape.
    With m = exp(l - max), the sum of m (l - max) becomes exp(shift) (sum of m (l - max) + shift * sum of m).
    """
    scale = shift.exp()
    carried = sums.clone()
    carried[0] *= scale
    if len(sums) > 2:
        carried[2] = (sums[2] + shift * sums[0]) * scale
    return carried
