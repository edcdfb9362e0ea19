"""What did the model think of each token? From hidden states to one fp32 log-prob, vocabulary-parallel.

One function for old, reference and current log-probs. [tokens, vocabulary] never exists as a whole: logits
are built for `chunk_size` tokens at a time, reduced to three numbers per token, and built again in the
backward pass. Imports nothing of ours; the process group is an argument.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_TOKENS = 512


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
    return _TokenLogProbs.apply(hidden, output_weight, targets, tp_group, vocab_size, temperature, chunk_size)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, tp_group, vocab_size, temperature, chunk_size):
        first = dist.get_rank(tp_group) * weight.shape[0]
        maxima = hidden.new_empty(hidden.shape[0], dtype=_accurate(hidden.dtype))
        sums, target_logits = torch.empty_like(maxima), torch.empty_like(maxima)
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = _logits(hidden[rows], weight, first, vocab_size, temperature)
            maxima[rows] = logits.amax(dim=-1)
            sums[rows] = (logits - _finite(maxima[rows])[:, None]).exp().sum(dim=-1)
            target_logits[rows] = _pick(logits, targets[rows] - first)
        if dist.get_world_size(tp_group) > 1:
            global_maxima = maxima.clone()
            dist.all_reduce(global_maxima, op=dist.ReduceOp.MAX, group=tp_group)
            parts = torch.stack([sums * (_finite(maxima) - global_maxima).exp(), target_logits])
            parts[0][maxima == -torch.inf] = 0.0  # a rank that holds padding rows only
            dist.all_reduce(parts, group=tp_group)
            maxima, (sums, target_logits) = global_maxima, parts
        log_normaliser = maxima + sums.log()
        ctx.save_for_backward(hidden, weight, targets, log_normaliser)
        ctx.arguments = tp_group, first, vocab_size, temperature, chunk_size
        return (target_logits - log_normaliser).to(torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, targets, log_normaliser = ctx.saved_tensors
        tp_group, first, vocab_size, temperature, chunk_size = ctx.arguments
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=_accurate(weight.dtype))
        for rows in _chunks(hidden.shape[0], chunk_size):
            logits = _logits(hidden[rows], weight, first, vocab_size, temperature)
            # d log p(target) / d logit_v = [v == target] - p(v)
            grad_logits = (logits - log_normaliser[rows, None]).exp_().mul_(-grad[rows, None])
            _add_at(grad_logits, targets[rows] - first, grad[rows])
            grad_logits = grad_logits.div_(temperature).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[rows]
        if dist.get_world_size(tp_group) > 1:
            dist.all_reduce(grad_hidden, group=tp_group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


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
