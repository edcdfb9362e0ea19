"""Which token comes next? One uniform number per token, inverted through the cumulative distribution.

The uniforms are a function of (run seed, step, slot of the prompt, response): no generator is carried along, so
samples do not depend on which process draws them, in which batch, or whether the run was resumed. Inverting the
distribution with one number means that tiny differences of arithmetic between layouts almost never change a token.

Vocabulary-parallel: logits stay sharded over tp; every rank returns the same token.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_powerflow.random_streams import generator
from megatron_powerflow.records import Purpose

# The running sum over the vocabulary is fp64 from block to block: in fp32, 150,000 probabilities would misplace its
# tail. The exponentials are fp32, as the logits are, and so is a block's sum: off by 1e-7 of the block's own mass.
BLOCK = 128


def uniforms(
    *, seed: int, step: int, slot: int, response: int, count: int, purpose: Purpose = Purpose.ROLLOUTS
) -> np.ndarray:
    """Return the random numbers that sample one response: [count] fp64, uniform in [0, 1).

    They come from Philox, which is counter-based (`random_streams.py`).
    """
    return generator(purpose, seed=seed, index=step, slot=slot, response=response).random(count)


def sample_tokens(
    logits: Tensor, uniform: Tensor | None, *, tp_group: dist.ProcessGroup, first: int
) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits), the vocabulary split over tp_group.

    logits: [r, V/tp] fp32, temperature applied, padding at -inf, OVERWRITTEN: a second buffer of that size would be
    mapped anew for every token; `first` is the global id of column 0. uniform: [r] fp64 in [0, 1); None: the most
    likely token (lowest id on ties). Returns tokens [r] int64 and their log-probs [r] fp32, equal on every rank of
    tp_group. Collective over tp_group.
    """
    maxima = logits.amax(dim=-1)
    _reduce(maxima, dist.ReduceOp.MAX, tp_group)
    if uniform is None:
        columns, here = _local_argmax(logits, maxima, first, tp_group)
    mass = logits.sub_(maxima[:, None]).exp_()
    blocks = _blocks(mass)  # [r, blocks, BLOCK] fp32
    block_sums = blocks.sum(dim=-1).double()
    sums = _gather(block_sums.sum(dim=-1), tp_group)  # [tp, r]
    total = sums.sum(dim=0)
    if uniform is not None:
        columns, here = _local_inverse(blocks, block_sums, sums, uniform * total, tp_group)
        columns = columns.clamp_max_(mass.shape[1] - 1)  # of a shard without any mass, and so not here
    chosen = mass.gather(1, columns[:, None]).squeeze(1).double().log()  # less the maximum, to 1e-7
    answer = torch.stack([torch.where(here, columns + first, 0).double(), torch.where(here, chosen, 0.0)])
    _reduce(answer, dist.ReduceOp.SUM, tp_group)
    log_probs = answer[1] - total.log()
    return answer[0].long(), log_probs.float()


def _blocks(mass: Tensor) -> Tensor:
    """Split [r, v] into blocks, [r, blocks, BLOCK], the last one filled up with zeros."""
    missing = -mass.shape[1] % BLOCK
    if missing:
        mass = F.pad(mass, (0, missing))
    return mass.unflatten(1, (-1, BLOCK))


def _local_inverse(
    mass: Tensor, block_sums: Tensor, sums: Tensor, threshold: Tensor, tp_group
) -> tuple[Tensor, Tensor]:
    """Return this shard's column at which the running mass first exceeds the threshold, and whether it is here.

    First comes the block, then the column in it; both running sums are fp64.
    """
    before = (sums.cumsum(dim=0) - sums)[dist.get_rank(tp_group)]
    block, rest = _first_above(block_sums, threshold - before)
    inside = mass[torch.arange(len(mass), device=mass.device), block].double()
    column, _ = _first_above(inside, rest)
    return block * BLOCK + column, _owner(sums, threshold) == dist.get_rank(tp_group)


def _first_above(parts: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return where the running sum first exceeds the threshold [r], and the threshold less the sum before [r].

    parts: [r, n] fp64; threshold: [r].
    """
    running = parts.cumsum(dim=-1)
    place = torch.searchsorted(running, threshold[:, None], right=True)
    # rounding may carry the threshold past the last part that has any mass: stay on it
    place = torch.minimum(place, _last_positive(parts, dim=1)[:, None])
    rest = threshold[:, None] - running.gather(1, place) + parts.gather(1, place)
    return place.squeeze(1), rest.squeeze(1)


def _owner(sums: Tensor, threshold: Tensor) -> Tensor:
    """Return the rank [r] whose share of the running total holds the threshold: the first that exceeds it."""
    exceeds = sums.cumsum(dim=0) > threshold
    return torch.where(exceeds.any(dim=0), exceeds.int().argmax(dim=0), _last_positive(sums, dim=0))


def _last_positive(values: Tensor, dim: int) -> Tensor:
    """Return the index of the last value above 0, or 0 where there is none.

    So a model that blew up (NaN) draws a token that exists.
    """
    positive = values > 0
    last = values.shape[dim] - 1 - positive.flip(dim).int().argmax(dim=dim)
    return torch.where(positive.any(dim=dim), last, 0)


def _local_argmax(logits: Tensor, maxima: Tensor, first: int, tp_group) -> tuple[Tensor, Tensor]:
    columns = logits.argmax(dim=-1)
    at_maximum = logits.gather(1, columns[:, None]).squeeze(1) == maxima
    candidate = torch.where(at_maximum, columns + first, torch.iinfo(torch.int64).max)
    lowest = candidate.clone()
    _reduce(lowest, dist.ReduceOp.MIN, tp_group)
    return columns, candidate == lowest


def _reduce(tensor: Tensor, op, group: dist.ProcessGroup) -> None:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    if dist.get_world_size(group) == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)
