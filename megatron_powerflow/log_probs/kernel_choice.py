"""Which arithmetic computes the log-probs of this run?

On CUDA it is Triton's, once that has agreed with the plain one on the first batch. It is the plain one everywhere else,
and also where the two disagree, which a warning then says.

Left out: the arithmetics themselves, and a choice by speed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_powerflow.log_probs.plain as plain
from megatron_powerflow.log_probs.tiles import Arithmetic
from megatron_powerflow.log_probs.token_log_probs import TokenStatistics, token_log_probs, token_statistics

# What an arithmetic is judged by: at most so many tokens, in tiles of so many logits, and columns of the gradient.
JUDGED_TOKENS = 256
JUDGED_LOGITS = 2**20
JUDGED_COLUMNS = 4096
TOLERANCE = 1e-4  # relative, of fp32 sums in another order


def triton_where_it_runs(hidden: Tensor) -> Arithmetic | None:
    """Return the Triton arithmetic if `hidden` is on CUDA and of a dtype that it knows; else None.

    Warns (RuntimeWarning) where the package triton is not installed.
    """
    if hidden.device.type != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        warnings.warn("log-probs by the plain path: the package triton is not installed", RuntimeWarning, stacklevel=2)
        return None
    import megatron_powerflow.log_probs.triton as in_triton

    return in_triton if hidden.dtype in in_triton.DTYPES else None


class LogProbKernel:
    """The functions `token_log_probs` and `token_statistics` with an arithmetic that is settled by the first tokens.

    candidate: hidden -> the arithmetic to be tried, the same on every rank of tp_group, or None for the plain one.
    """

    def __init__(self, candidate: Callable[[Tensor], Arithmetic | None] = triton_where_it_runs) -> None:
        self._candidate = candidate
        self._settled: Arithmetic | None = None

    def log_probs(self, hidden: Tensor, output_weight: Tensor, targets: Tensor, **arguments) -> Tensor:
        """Compute `token_log_probs`, and settle the arithmetic if it is not. Collective over tp_group."""
        arithmetic = self._arithmetic(hidden, output_weight, targets, **arguments)
        return token_log_probs(hidden, output_weight, targets, arithmetic=arithmetic, **arguments)

    def statistics(self, hidden: Tensor, output_weight: Tensor, targets: Tensor, **arguments) -> TokenStatistics:
        """Compute `token_statistics`, and settle the arithmetic if it is not. Collective over tp_group."""
        arithmetic = self._arithmetic(hidden, output_weight, targets, **arguments)
        return token_statistics(hidden, output_weight, targets, arithmetic=arithmetic, **arguments)

    def _arithmetic(self, hidden, weight, targets, *, tp_group, vocab_size, temperature, softcap=None) -> Arithmetic:
        if self._settled is None and len(targets):
            candidate = self._candidate(hidden)
            if candidate is not None:
                first = dist.get_rank(tp_group) * weight.shape[0]
                real = weight.detach()[: max(vocab_size - first, 0)]
                if not _proven(candidate, hidden.detach(), real, targets - first, temperature, softcap, tp_group):
                    candidate = None
            self._settled = candidate or plain
        return self._settled or plain


def _proven(candidate: Arithmetic, hidden, weight, columns, temperature, softcap, tp_group) -> bool:
    """Tell whether the candidate works and agrees with the plain arithmetic on every rank of tp_group, and warn if not.

    hidden, weight, columns, temperature, softcap: as in `disagreement`. Collective over tp_group.
    """
    failure = ""
    try:
        worst = disagreement(candidate, hidden, weight, columns, temperature, softcap)
    except candidate.FAILURES as error:
        failure = f" ({type(error).__name__}: {error})"
        worst = hidden.new_tensor(torch.inf, dtype=torch.float32)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=tp_group)
    if worst.item() <= 1.0:
        return True
    warnings.warn(
        f"log-probs by the plain path: {candidate.__name__} differs from it by {worst.item():.3g} times what rounding "
        f"explains, on the first batch{failure}; please report this with the GPU's name",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


@torch.no_grad()
def disagreement(
    candidate: Arithmetic,
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    temperature: float,
    softcap: float | None = None,
) -> Tensor:
    """Return the largest difference of `candidate` from the plain arithmetic in fp32, over what rounding explains.

    hidden: [t, H]; the first JUDGED_TOKENS are judged. weight: [v, H], this rank's real rows. columns: [t] int64, the
    targets' rows of weight. Returns a scalar fp32: 1 or less is agreement; infinite where either is not a number.
    """
    judged, columns = hidden[:JUDGED_TOKENS], columns[:JUDGED_TOKENS]
    worst = judged.new_zeros((), dtype=torch.float32)
    if not len(weight):  # a rank that holds padding only
        return worst
    compared = ((candidate, judged), (plain, judged.float()))
    actual, exact = (
        _per_token(
            *arithmetic.shard_sums(tokens, weight, columns, temperature, True, JUDGED_LOGITS, softcap), len(weight)
        )
        for arithmetic, tokens in compared
    )
    worst = torch.maximum(worst, _infinite((actual - exact).abs() / (1.0 + exact.abs()) / TOLERANCE).amax())
    block = weight[:JUDGED_COLUMNS]
    ramp = torch.linspace(-1.0, 1.0, len(judged), device=judged.device)  # upstream gradients, of both signs
    targets = torch.arange(len(judged), device=judged.device) % len(block)
    per_token = (targets, exact[0], ramp, ramp.flip(0), exact[2])
    for upstream in (per_token[:3], per_token):  # of log-probs alone, and with the entropy's
        actual_gradient, exact_gradient = (
            arithmetic.grad_logits(tokens, block, temperature, *upstream, softcap=softcap).float()
            for arithmetic, tokens in compared
        )
        # rounded once to hidden's dtype, where sums in another order differ by TOLERANCE at most
        difference = (actual_gradient - exact_gradient).norm() / exact_gradient.norm()
        relative = difference / (torch.finfo(judged.dtype).eps + TOLERANCE)
        worst = torch.maximum(worst, _infinite(relative))
    return worst


def _per_token(maxima: Tensor, sums: Tensor, num_columns: int) -> Tensor:
    """Return [4, t]: log of the normaliser, the target's logit, entropy and mean logit, over this rank's columns.

    maxima, sums: those of `plain.shard_sums`, with everything.
    """
    log_sum = sums[0].log()
    return torch.stack([maxima + log_sum, sums[1], log_sum - sums[2] / sums[0], sums[3] / num_columns])


def _infinite(values: Tensor) -> Tensor:
    """Return the values with infinity in the place of NaN, which no maximum would show."""
    return torch.where(values.isnan(), torch.inf, values)
