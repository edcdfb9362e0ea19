"""How is a tile of logits reduced, and what is its gradient?

This module computes both in torch alone, on any device, and is the reference for every other arithmetic. An arithmetic
is a module with `shard_sums`, `grad_logits` and `FAILURES`, the exceptions by which it says that it does not work on
this machine. It knows this rank's rows of the output weight and nothing of other ranks.

Left out: communication, the gradients of hidden and weight (`token_log_probs.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_powerflow.log_probs.tiles import from_another_maximum, slices, tile_shape

FAILURES: tuple[type[Exception], ...] = ()


def shard_sums(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    temperature: float,
    everything: bool,
    max_logits: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Reduce the logits of each token, over this rank's columns of the vocabulary, to their maximum and a few sums.

    hidden: [t, H]. weight: [v, H], v >= 0 real rows. columns: [t] int64, the target's row of weight; outside [0, v)
    where another rank has it. max_logits: logits held at a time. temperature, softcap: see `make_logits`.
    Returns (maxima, sums), fp32 or wider. maxima: [t] of the logits l, the lowest number where v is 0. sums: [2, t] of
    exp(l - max) and of the target's l, 0 where another rank has it; with everything [4, t], also of
    exp(l - max) (l - max) and of l.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    num_tokens = hidden.shape[0]
    # the lowest number, not -inf: differences stay finite, their exp is 0
    maxima = hidden.new_full((num_tokens,), torch.finfo(dtype).min, dtype=dtype)
    sums = hidden.new_zeros(4 if everything else 2, num_tokens, dtype=dtype)
    num_rows, num_columns = tile_shape(num_tokens, max_logits)
    for rows in slices(num_tokens, num_rows):
        for block in slices(weight.shape[0], num_columns):
            logits = make_logits(hidden[rows], weight[block], temperature, softcap, dtype)
            sums[1, rows] += _pick(logits, columns[rows] - block.start)
            if everything:
                sums[3, rows] += logits.sum(dim=-1)
            maximum = torch.maximum(maxima[rows], logits.amax(dim=-1))
            sums[:, rows] = from_another_maximum(sums[:, rows], maxima[rows] - maximum)
            maxima[rows] = maximum
            logits -= maximum[:, None]
            if everything:
                mass = logits.exp()
                sums[2, rows] += logits.mul_(mass).sum(dim=-1)
            else:
                mass = logits.exp_()
            sums[0, rows] += mass.sum(dim=-1)
    return maxima, sums


def grad_logits(
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
) -> Tensor:
    """Return the gradient by the tile hidden @ weight^T, before cap and temperature: [t, v] in hidden's dtype.

    hidden: [t, H]. weight: [v, H]. Per token, [t]: columns as in `shard_sums`; log_normaliser over the whole
    vocabulary; grad, the upstream gradient by the log-prob; grad_entropy, that by the entropy, and the entropy itself.
    """
    logits = make_logits(hidden, weight, temperature, softcap, log_normaliser.dtype)
    if softcap is not None:  # d cap tanh(z / cap) / dz = 1 - tanh(z / cap)^2
        cap_slope = 1.0 - (logits * (temperature / softcap)).square_()
    log_p = logits.sub_(log_normaliser[:, None])
    if grad_entropy is None:
        slope = -grad[:, None]  # d log p(target) / d logit_v = [v == target] - p(v)
    else:
        assert entropy is not None, "entropy comes with grad_entropy"
        # d entropy / d logit_v = -p(v) (log p(v) + entropy)
        slope = (log_p + entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad[:, None])
    gradient = log_p.exp_().mul_(slope)
    inside, column = _in_tile(columns, weight.shape[0])
    gradient.scatter_add_(1, column[:, None], torch.where(inside, grad, 0.0)[:, None])
    if temperature != 1.0:
        gradient /= temperature
    if softcap is not None:
        gradient *= cap_slope
    return gradient.to(hidden.dtype)


def make_logits(
    hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    """Return the logits of hidden [t, H] and weight [v, H] as a new [t, v] of `dtype`; the sampler's are made so, too.

    The product is made in hidden's dtype, which is a wider one than weight's when an arithmetic is judged. A logit z
    becomes softcap * tanh(z / softcap), where there is a cap, and is then divided by the temperature.
    """
    logits = (hidden @ weight.to(hidden.dtype).t()).to(dtype)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.div_(temperature) if temperature != 1.0 else logits


def _pick(logits: Tensor, columns: Tensor) -> Tensor:
    """Return logits[i, columns[i]] where the column is in this tile, else 0: [t]."""
    inside, column = _in_tile(columns, logits.shape[1])
    return torch.where(inside, logits.gather(1, column[:, None]).squeeze(1), 0.0)


class TileColumns(NamedTuple):
    """Whether each target's column is inside the tile, [t] bool, and the column, [t] int64, 0 where it is not."""

    inside: Tensor
    column: Tensor


def _in_tile(columns: Tensor, num_columns: int) -> TileColumns:
    inside = (columns >= 0) & (columns < num_columns)
    return TileColumns(inside, torch.where(inside, columns, 0))
