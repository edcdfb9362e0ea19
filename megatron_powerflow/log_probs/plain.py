"""How is a tile of logits reduced, and how does its gradient look? In torch alone, on any device: the reference for
every other arithmetic.

An arithmetic is a module with `shard_sums`, `grad_logits` and `FAILURES`, the exceptions by which it says that it does
not work on this machine. It knows this rank's rows of the output weight and nothing of other ranks.

Left out: communication, the gradients of hidden and weight (`token_log_probs.py`).
"""

from __future__ import annotations

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
    """What this rank's columns say of each token.

    hidden: [t, H]. weight: [v, H], v >= 0 real rows. columns: [t] int64, the target's row of weight; outside [0, v)
    where another rank has it. max_logits: logits held at a time. temperature, softcap: see `make_logits`.
    Returns, fp32 or wider, max [t] of the logits l (the lowest number where v is 0) and sums [2 or 4, t]:
    exp(l - max); the target's l, else 0; with everything also exp(l - max) (l - max), and l.
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
    """[t, v] in hidden's dtype: gradient of the tile hidden @ weight^T, before cap and temperature.

    hidden: [t, H]. weight: [v, H]. Per token: columns as in `shard_sums`; log_normaliser over the whole vocabulary;
    grad of the log-prob; grad_entropy of the entropy, which comes with it.
    """
    logits = make_logits(hidden, weight, temperature, softcap, log_normaliser.dtype)
    if softcap is not None:  # d cap tanh(z / cap) / dz = 1 - tanh(z / cap)^2
        of_cap = 1.0 - (logits * (temperature / softcap)).square_()
    log_p = logits.sub_(log_normaliser[:, None])
    if grad_entropy is None:
        slope = -grad[:, None]  # d log p(target) / d logit_v = [v == target] - p(v)
    else:
        assert entropy is not None, "it comes with grad_entropy"
        # d entropy / d logit_v = -p(v) (log p(v) + entropy)
        slope = (log_p + entropy[:, None]).mul_(-grad_entropy[:, None]).sub_(grad[:, None])
    gradient = log_p.exp_().mul_(slope)
    here, place = _here(columns, weight.shape[0])
    gradient.scatter_add_(1, place[:, None], torch.where(here, grad, 0.0)[:, None])
    if temperature != 1.0:
        gradient /= temperature
    if softcap is not None:
        gradient *= of_cap
    return gradient.to(hidden.dtype)


def make_logits(
    hidden: Tensor, weight: Tensor, temperature: float, softcap: float | None, dtype: torch.dtype
) -> Tensor:
    """hidden [t, H], weight [v, H] -> a new [t, v] of `dtype`, multiplied in hidden's dtype: a wider one than weight's
    to judge an arithmetic. A logit z becomes softcap * tanh(z / softcap), where there is one, and is then divided by
    the temperature. The sampler's logits, too.
    """
    logits = (hidden @ weight.to(hidden.dtype).t()).to(dtype)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.div_(temperature) if temperature != 1.0 else logits


def _pick(logits: Tensor, columns: Tensor) -> Tensor:
    """logits[i, columns[i]] where the column is of this tile, else 0."""
    here, place = _here(columns, logits.shape[1])
    return torch.where(here, logits.gather(1, place[:, None]).squeeze(1), 0.0)


def _here(columns: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """[t] whether the column is of this tile, and the column, 0 where it is not."""
    here = (columns >= 0) & (columns < num_columns)
    return here, torch.where(here, columns, 0)
