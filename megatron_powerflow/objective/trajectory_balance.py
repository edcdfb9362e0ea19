"""What is the loss of a batch of responses? Length-aware trajectory balance, as pure functions of [B] tensors.

    delta_b = log_z[g(b)] + (S_b - alpha * S_ref,b) / n_b - alpha * psi_b
    loss    = (1/B) * sum_b w_b * delta_b^2                              (Eq. 10, arXiv 2603.18363)

B counts the rollouts kept in the whole step, over all ranks and micro-batches; it is an argument.

Laws, each tested by name:
- d loss / d log pi_t = 2 w delta / (n B), equal for all tokens of a response; nothing flows through w, psi or S_ref.
- ((S - alpha S_ref)/n + log_z)^2 is the loss for psi = 0, value and gradient.
- The fixed point is pi* ~ p_base^alpha * exp(-lambda |y|) with lambda = log_z, where every delta is 0.

Left out: where the log-probs come from, sums over ranks, the learned head.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Ratio = Literal["none", "seq", "seq_mean"]


def partial_residual(
    sequence_log_prob: Tensor, ref_sequence_log_prob: Tensor, num_tokens: Tensor, psi: Tensor, alpha: float
) -> Tensor:
    """[B] the residual without log Z': (S - alpha * S_ref) / n - alpha * psi. n counts EOS when it was emitted."""
    return (sequence_log_prob - alpha * ref_sequence_log_prob) / num_tokens - alpha * psi


class Weight(NamedTuple):
    """w: [B] clipped, detached; ratio: [B] before clipping."""

    weight: Tensor
    ratio: Tensor


def importance_weight(
    sequence_log_prob: Tensor, old_sequence_log_prob: Tensor, num_tokens: Tensor, *, ratio: Ratio, clip_epsilon: float
) -> Weight:
    """w = clip(exp(S - S_old), 1 - eps, 1 + eps), detached. `seq_mean` takes (S - S_old) / n instead (GSPO).

    Over 900 tokens a whole-sequence ratio leaves [0.8, 1.2] at a mean drift of 2.5e-4 a token: see the clip
    fraction in the metrics. `none`: 1.
    """
    if ratio == "none":
        ones = torch.ones_like(sequence_log_prob.detach())
        return Weight(ones, ones)
    difference = (sequence_log_prob - old_sequence_log_prob).detach()
    if ratio == "seq_mean":
        difference = difference / num_tokens
    exact = difference.exp()
    return Weight(exact.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon), exact)


class Loss(NamedTuple):
    """loss: scalar, this call's share of the step's loss; residual: [B]."""

    loss: Tensor
    residual: Tensor


def la_tb_loss(partial: Tensor, log_z: Tensor, weight: Tensor, kept: Tensor, num_kept: float | Tensor) -> Loss:
    """sum of w * delta^2 over the kept rollouts here / kept rollouts of the global batch (Eq. 10).

    partial: `partial_residual`; log_z carries gradient from the head, or none from a group estimate. All [B].
    """
    residual = log_z + partial
    share = torch.where(kept, weight.detach() * residual.square(), 0.0).sum() / num_kept
    return Loss(share, residual)


def initial_log_z(ref_sequence_log_prob: Tensor, num_tokens: Tensor, psi: Tensor, kept: Tensor, alpha: float) -> float:
    """The value at which the mean residual is 0 at step 0, where S = S_ref:

    (alpha - 1) * mean over responses of S_ref / n + alpha * mean psi. A wrong fixed log Z' is a bias on length,
    quadratic in n, so the head starts here and not at 0.
    """
    mean_token_log_prob = (ref_sequence_log_prob / num_tokens)[kept].mean()
    return float((alpha - 1.0) * mean_token_log_prob + alpha * psi[kept].mean())
