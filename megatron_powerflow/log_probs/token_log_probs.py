"""How likely was each token to the model?

Hidden states become one fp32 log-prob per token, vocabulary-parallel; on request the entropy and the certainty of the
token's distribution come with it. One function serves old, reference and current log-probs. [tokens, vocabulary] never
exists as a whole: logits are built in tiles of at most `max_logits`, reduced to a few numbers per token, and built
again in the backward pass.

    hidden [t, H]   W [V/tp, H]        forward   for each tile: running max and sum, the target's logit  -> [t]
         \\           /                           over tp_group: max of the maxima, sum of the rescaled sums
        tile [<= R, <= C]              backward  for each block of C rows of W, for each R tokens: the tile again,
        R * C <= max_logits                      grad_W[block] += tile^T hidden;  grad_hidden += tile W[block]

The outer loop of the backward pass is over the vocabulary, so a row of grad_W is finished before the next block
begins: in bf16 only a block of it is ever held in fp32. What grows with the vocabulary is grad_W itself.

Left out: how a tile is computed (`plain.py`, `triton.py`), who chooses between the two (`kernel_choice.py`), and adding
grad_W into Megatron's main_grad (with tied weights the embedding adds to the same buffer, through autograd). This
module imports nothing from outside its folder; the process group is an argument.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import megatron_powerflow.log_probs.plain as plain
from megatron_powerflow.log_probs.tiles import Arithmetic, from_another_maximum, slices, tile_shape

# Logits in a tile: 4 MiB in fp32 on a CPU (its cache), 128 MiB elsewhere (few, large launches)
MAX_LOGITS_CPU = 2**20
MAX_LOGITS = 2**25
# Nats by which rounding may lift a log-prob above 0; without it max + log(sum >= 1) is never below the target's logit
ROUNDING = 1e-4


class TokenStatistics(NamedTuple):
    """What the model's distribution says at each token, all [t] fp32, in nats.

    log_probs: of the targets. entropy: -sum_v p_v log p_v. certainty: logsumexp - mean of the logits, which is
    KL(Uniform || p) + log(vocabulary), detached.
    """

    log_probs: Tensor
    entropy: Tensor
    certainty: Tensor


def token_log_probs(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    softcap: float | None = None,
    max_logits: int | None = None,
    arithmetic: Arithmetic = plain,
) -> Tensor:
    """Compute log softmax(hidden @ W^T / temperature)[target], the softmax over the real vocabulary. Collective over
    tp_group, in the backward pass as well.

    softcap: the logits z = hidden @ W^T become softcap * tanh(z / softcap) before the temperature; None: they stay z.
    hidden: [t, H] any float, the same on every rank of tp_group.
    output_weight: [V_padded / tp, H] in hidden's dtype, this rank's rows; rows at or beyond vocab_size are padding,
        never read, and their gradient is 0.
    targets: [t] int64, 0 <= target < vocab_size.
    max_logits: logits held at a time; default by device. arithmetic: the module that computes a tile.
    Returns [t] fp32, equal on every rank of tp_group. Gradients reach hidden (complete on every rank, in its
    dtype) and output_weight (this rank's rows); the one that nobody asks for is not computed. Logits are multiplied
    in hidden's dtype, and reduced in fp32 (fp64 when the inputs are).
    Raises RuntimeError when a log-prob is above 0 or a target is outside (on CUDA: a device-side assertion).
    """
    arguments = (tp_group, vocab_size, temperature, softcap, max_logits, arithmetic)
    return _TokenStatistics.apply(hidden, output_weight, targets, False, *arguments)[0]


def token_statistics(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    softcap: float | None = None,
    max_logits: int | None = None,
    arithmetic: Arithmetic = plain,
) -> TokenStatistics:
    """Compute `token_log_probs` and, of the same distributions, entropy (with gradient) and certainty (without).

    Arguments, errors and collectives are those of `token_log_probs`.
    """
    arguments = (tp_group, vocab_size, temperature, softcap, max_logits, arithmetic)
    return TokenStatistics(*_TokenStatistics.apply(hidden, output_weight, targets, True, *arguments))


class _TokenStatistics(torch.autograd.Function):
    """The autograd function behind both. `everything` False: the log-probs alone; the other two results are empty."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, everything, *arguments):
        tp_group, vocab_size, temperature, softcap, max_logits, arithmetic = arguments
        inside = ((targets >= 0) & (targets < vocab_size)).all()
        _require(inside, f"a target is not in the vocabulary of {vocab_size}: the micro-batch is broken")
        first = dist.get_rank(tp_group) * weight.shape[0]
        num_real = min(max(vocab_size - first, 0), weight.shape[0])  # the rest is padding
        columns = targets - first  # on this rank where 0 <= column < num_real
        if max_logits is None:
            max_logits = MAX_LOGITS_CPU if hidden.device.type == "cpu" else MAX_LOGITS
        real = weight[:num_real]
        maxima, sums = arithmetic.shard_sums(hidden, real, columns, temperature, everything, max_logits, softcap)
        if dist.get_world_size(tp_group) > 1:
            maxima, sums = _over_ranks(maxima, sums, tp_group)
        log_normaliser = maxima + sums[0].log()
        log_probs = sums[1] - log_normaliser
        _require(~(log_probs > ROUNDING).any(), "a token's log-prob is above 0: the log-prob kernel is broken")
        entropy = certainty = log_probs.new_empty(0)
        if everything:
            entropy = sums[0].log() - sums[2] / sums[0]  # log Z - E[logit], both from the maximum
            certainty = log_normaliser - sums[3] / vocab_size
        ctx.save_for_backward(hidden, weight, columns, log_normaliser, entropy)
        ctx.arguments = tp_group, num_real, temperature, softcap, max_logits, arithmetic
        ctx.mark_non_differentiable(certainty)
        ctx.set_materialize_grads(False)
        return log_probs, entropy.clone(), certainty

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, grad_entropy, _):
        hidden, weight, columns, log_normaliser, entropy = ctx.saved_tensors
        tp_group, num_real, temperature, softcap, max_logits, arithmetic = ctx.arguments
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad = torch.zeros_like(log_normaliser) if grad is None else grad
        upstream = [grad] if grad_entropy is None else [grad, grad_entropy, entropy]
        grad_hidden = torch.zeros_like(hidden, dtype=log_normaliser.dtype) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        num_rows, num_columns = tile_shape(hidden.shape[0], max_logits)
        for block in slices(num_real, num_columns):
            block_weight = weight[block]
            # a view where the weight is fp32 or wider; else fp32, so that many tokens are added and rounded once
            sums = None if grad_weight is None else grad_weight[block].to(log_normaliser.dtype)
            for rows in slices(hidden.shape[0], num_rows):
                per_token = (values[rows] for values in (columns - block.start, log_normaliser, *upstream))
                tile = arithmetic.grad_logits(hidden[rows], block_weight, temperature, *per_token, softcap=softcap)
                if grad_hidden is not None:
                    _add_product(grad_hidden[rows], tile, block_weight)
                if sums is not None:
                    _add_product(sums, tile.t(), hidden[rows])
            if grad_weight is not None and sums is not None and sums.dtype != weight.dtype:
                grad_weight[block] = sums
        if grad_hidden is not None:
            if dist.get_world_size(tp_group) > 1:
                dist.all_reduce(grad_hidden, group=tp_group)
            grad_hidden = grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, *[None] * 8


# It does not wait: on CUDA the error comes with a later call. NaN passes, for the optimizer skips such a step.
_require = torch._assert_async


def _over_ranks(maxima: Tensor, sums: Tensor, tp_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return maximum and sums over the columns of all ranks, the sums taken from the common maximum. Collective."""
    everywhere = maxima.clone()
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=tp_group)
    parts = from_another_maximum(sums, maxima - everywhere)
    dist.all_reduce(parts, group=tp_group)
    return everywhere, parts


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to sums, in place; sums may be of a wider dtype."""
    if sums.dtype == left.dtype:
        sums.addmm_(left, right)
    else:
        sums += left @ right
