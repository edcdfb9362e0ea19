"""What did the model think of each token? From hidden states to one fp32 log-prob, vocabulary-parallel; on request
the entropy of its distribution and its certainty.

One function for old, reference and current log-probs. [tokens, vocabulary] never exists as a whole: logits
are built for `chunk_size` tokens at a time, reduced to three numbers per token, and built again in the
backward pass. Imports nothing of ours; the process group is an argument.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 512


class TokenStatistics(NamedTuple):
    """log_probs: of the targets. entropy: -sum_v p_v log p_v. certainty: logsumexp - mean of the logits, which is
    KL(Uniform || p) + log(vocabulary), detached. All [t] fp32, nats."""

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
    chunk_size: int = CHUNK_TOKENS,
) -> Tensor:
    """log softmax(hidden @ W^T / temperature)[target], the softmax over the real vocabulary.

    hidden: [t, H] any float, the same on every rank of tp_group.
    output_weight: [V_padded / tp, H], this rank's rows; rows at or beyond vocab_size are padding, excluded.
    targets: [t] int64, 0 <= target < vocab_size.
    Returns [t] fp32, equal on every rank of tp_group. Gradients reach hidden (complete on every rank, in its
    dtype) and output_weight (this rank's rows). Logits are multiplied in hidden's dtype and reduced in fp32.
    """
    arguments = (tp_group, vocab_size, temperature, chunk_size)
    return _TokenStatistics.apply(hidden, output_weight, targets, False, *arguments)[0]


def token_statistics(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    temperature: float,
    chunk_size: int = CHUNK_TOKENS,
) -> TokenStatistics:
    """`token_log_probs` and, of the same distributions, entropy (with gradient) and certainty (without)."""
    arguments = (tp_group, vocab_size, temperature, chunk_size)
    return TokenStatistics(*_TokenStatistics.apply(hidden, output_weight, targets, True, *arguments))


class _TokenStatistics(torch.autograd.Function):
    """`everything` False: the log-probs alone; the other two are empty."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, everything, tp_group, vocab_size, temperature, chunk_size):
        first = dist.get_rank(tp_group) * weight.shape[0]
        maxima = hidden.new_empty(hidden.shape[0], dtype=_accurate(hidden.dtype))
        # of this rank's columns, per token: sum of exp(logit - max), the target's logit;
        # with everything also sum of exp(logit - max) * (logit - max), sum of logits
        sums = hidden.new_zeros(4 if everything else 2, hidden.shape[0], dtype=maxima.dtype)
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = _logits(hidden[rows], weight, first, vocab_size, temperature)
            maxima[rows] = logits.amax(dim=-1)
            shifted = logits - _finite(maxima[rows])[:, None]
            mass = shifted.exp()
            sums[0, rows] = mass.sum(dim=-1)
            sums[1, rows] = _pick(logits, targets[rows] - first)
            if everything:
                real = logits > -torch.inf
                sums[2, rows] = torch.where(real, mass * shifted, 0.0).sum(dim=-1)
                sums[3, rows] = torch.where(real, logits, 0.0).sum(dim=-1)
        if dist.get_world_size(tp_group) > 1:
            maxima, sums = _over_ranks(maxima, sums, tp_group)
        log_normaliser = maxima + sums[0].log()
        log_probs = sums[1] - log_normaliser
        entropy = certainty = log_probs.new_empty(0)
        if everything:
            entropy = sums[0].log() - sums[2] / sums[0]  # log Z - E[logit], both from the maximum
            certainty = log_normaliser - sums[3] / vocab_size
        ctx.save_for_backward(hidden, weight, targets, log_normaliser, entropy)
        ctx.arguments = tp_group, first, vocab_size, temperature, chunk_size
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        answer = tuple(values.to(dtype) for values in (log_probs, entropy.clone(), certainty))
        ctx.mark_non_differentiable(answer[2])
        return answer

    @staticmethod
    def backward(ctx, grad, grad_entropy, _):
        hidden, weight, targets, log_normaliser, entropy = ctx.saved_tensors
        tp_group, first, vocab_size, temperature, chunk_size = ctx.arguments
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_accurate(weight.dtype))
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = _logits(hidden[rows], weight, first, vocab_size, temperature)
            log_p = logits - log_normaliser[rows, None]
            # d log p(target) / d logit_v = [v == target] - p(v)
            slope = -grad[rows, None]
            if entropy.numel():
                # d entropy / d logit_v = -p(v) (log p(v) + entropy); p(v) is 0 in the padding
                finite_log_p = torch.where(log_p > -torch.inf, log_p, 0.0)
                slope = slope - grad_entropy[rows, None] * (finite_log_p + entropy[rows, None])
            grad_logits = log_p.exp_().mul_(slope)
            _add_at(grad_logits, targets[rows] - first, grad[rows])
            grad_logits = grad_logits.div_(temperature).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[rows]
        if dist.get_world_size(tp_group) > 1:
            dist.all_reduce(grad_hidden, group=tp_group)
        return grad_hidden, grad_weight.to(weight.dtype), *[None] * 6


def _over_ranks(maxima: Tensor, sums: Tensor, tp_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Maximum and sums over all columns of all ranks, the sums taken from the common maximum."""
    everywhere = maxima.clone()
    dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=tp_group)
    empty = maxima == -torch.inf  # a rank that holds padding rows only
    shift = torch.where(empty, 0.0, maxima - everywhere)
    scale = torch.where(empty, 0.0, shift.exp())
    parts = sums.clone()
    parts[0] = sums[0] * scale
    if len(sums) > 2:
        parts[2] = (sums[2] + shift * sums[0]) * scale  # sum of m (l - max) after the change of m and max
    dist.all_reduce(parts, group=tp_group)
    return everywhere, parts


def _accurate(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 when the inputs are fp64 (gradient checks)."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(num_tokens: int, chunk_size: int):
    return [slice(start, min(start + chunk_size, num_tokens)) for start in range(0, num_tokens, chunk_size)]


def _logits(hidden: Tensor, weight: Tensor, first: int, vocab_size: int, temperature: float) -> Tensor:
    """[t, V/tp] at the accurate dtype, divided by the temperature, padding at -inf."""
    logits = (hidden @ weight.t()).to(_accurate(hidden.dtype))
    if temperature != 1.0:
        logits = logits / temperature
    if first + weight.shape[0] > vocab_size:
        logits[:, max(vocab_size - first, 0) :] = -torch.inf
    return logits


def _finite(maxima: Tensor) -> Tensor:
    """-inf (a rank that holds padding only) made harmless: -inf - 0 is -inf, -inf - -inf would be NaN."""
    return torch.where(maxima == -torch.inf, 0.0, maxima)


def _pick(logits: Tensor, columns: Tensor) -> Tensor:
    """logits[i, columns[i]] where the column is on this rank, else 0."""
    here = (columns >= 0) & (columns < logits.shape[1])
    picked = logits.gather(1, torch.where(here, columns, 0)[:, None]).squeeze(1)
    return torch.where(here, picked, 0.0)


def _add_at(grad_logits: Tensor, columns: Tensor, values: Tensor) -> None:
    here = (columns >= 0) & (columns < grad_logits.shape[1])
    columns = torch.where(here, columns, 0)[:, None]
    grad_logits.scatter_add_(1, columns, torch.where(here, values, 0.0)[:, None].to(grad_logits.dtype))
