"""What is the loss of a batch of responses? Trajectory balance in all its normalisations, in pure functions of [B].

    delta_b = log_z[g(b)] + S_b / a_b - alpha * S_ref,b / c_b - alpha * psi_b - r_b
    loss    = (1/B) * sum_b w_b * m_b * delta_b^2                         (Eq. 10, arXiv 2603.18363: a = c = n, m = 1)

B counts the rollouts kept in the whole step, over all ranks and micro-batches; it is an argument. `length` is n, the
response's tokens with EOS, or min(n, M) under a tilt cap M, with which the fixed point is
p_base^alpha exp(-lambda min(n, M)).

These laws hold, and each is tested by name:
- d loss / d log pi_t = 2 w delta / (n B), equal for all tokens of a response; nothing flows through w, psi or S_ref.
- ((S - alpha S_ref)/n + log_z)^2 is the loss for psi = 0, value and gradient.
- The fixed point is pi* ~ p_base^alpha * exp(-lambda |y|) with lambda = log_z, where every delta is 0.

Left out: where the log-probs come from, sums over ranks, the learned head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_powerflow.objective.presets import Norm, Ratio


def partial_residual(
    sequence_log_prob: Tensor,
    ref_sequence_log_prob: Tensor,
    length: Tensor,
    psi: Tensor,
    alpha: float,
    *,
    policy_norm: Norm = "length",
    reference_norm: Norm = "length",
    reward: Tensor | float = 0.0,
) -> Tensor:
    """Return the residual without log Z': S / a - alpha * S_ref / c - alpha * psi - reward (Eq. 10, arXiv 2603.18363).

    All tensors are [B]. policy_norm, reference_norm: "length" for a, c = length, "none" for 1; two equal norms take one
    division. reward: the task's, times its scale; like psi it is not divided by a length. Returns [B], whose gradient
    is that of sequence_log_prob.
    """
    if policy_norm == reference_norm:
        energy = sequence_log_prob - alpha * ref_sequence_log_prob
        energy = energy / length if policy_norm == "length" else energy
    else:
        policy = sequence_log_prob / length if policy_norm == "length" else sequence_log_prob
        reference = ref_sequence_log_prob / length if reference_norm == "length" else ref_sequence_log_prob
        energy = policy - alpha * reference
    return energy - alpha * psi - reward


def token_spread(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, alpha: float) -> Tensor:
    """Return the variance over a response's tokens of x_t = log pi_t - alpha * log p_base,t: [B].

    mean_t (log_z + x_t)^2 = (log_z + mean x)^2 + variance, so the per-token loss is the sequence's squared residual
    plus this variance. log_probs, ref_log_probs: [B, s], 0 where masked; mask: [B, s] bool, True on response tokens.
    """
    excess = torch.where(mask, log_probs - alpha * ref_log_probs, 0.0)
    count = mask.sum(dim=1)
    mean = excess.sum(dim=1) / count
    return torch.where(mask, excess - mean[:, None], 0.0).square().sum(dim=1) / count


class Weight(NamedTuple):
    """The importance weight of each response, detached. weight: [B], clipped; ratio: [B], before clipping."""

    weight: Tensor
    ratio: Tensor


def importance_weight(
    sequence_log_prob: Tensor,
    old_sequence_log_prob: Tensor,
    num_tokens: Tensor,
    *,
    ratio: Ratio,
    clip_epsilon: float,
    upper_only: bool = False,
) -> Weight:
    """Return the importance weight w = clip(exp(S - S_old), 1 - eps, 1 + eps), detached.

    All tensors are [B]. ratio: "seq" as above; "seq_mean" takes (S - S_old) / n instead (GSPO, arXiv 2507.18071);
    "none": w is 1. upper_only: w = min(ratio, 1 + eps), as in GFlowRL (arXiv 2607.13394).
    Over 900 tokens a whole-sequence ratio leaves [0.8, 1.2] at a mean drift of 2.5e-4 a token: see the clip
    fraction in the metrics.
    """
    if ratio == "none":
        ones = torch.ones_like(sequence_log_prob.detach())
        return Weight(ones, ones)
    difference = (sequence_log_prob - old_sequence_log_prob).detach()
    if ratio == "seq_mean":
        difference = difference / num_tokens
    unclipped = difference.exp()
    return Weight(unclipped.clamp(0.0 if upper_only else 1.0 - clip_epsilon, 1.0 + clip_epsilon), unclipped)


class Loss(NamedTuple):
    """The loss of a call. loss: scalar, this call's share of the step's loss; residual: [B]; terms: [B], whose sum over
    the kept rollouts of the global batch is the loss."""

    loss: Tensor
    residual: Tensor
    terms: Tensor


def balance_loss(
    partial: Tensor,
    log_z: Tensor,
    weight: Tensor,
    kept: Tensor,
    num_kept: float | Tensor,
    spread: Tensor | float = 0.0,
) -> Loss:
    """Return the sum of w * (delta^2 + spread) over this call's kept rollouts / the kept rollouts of the global batch
    (Eq. 10, arXiv 2603.18363).

    partial: `partial_residual`; log_z: with gradient from the head, without from a group estimate; weight: w * m,
    detached by this function; kept: bool; spread: `token_spread` for the per-token loss. All tensors are [B].
    num_kept: the kept rollouts of the global batch.
    """
    residual = log_z + partial
    terms = torch.where(kept, weight.detach() * (residual.square() + spread), 0.0)
    return Loss(terms.sum() / num_kept, residual, terms)


def initial_log_z(partial: Tensor, weight: Tensor, kept: Tensor) -> float:
    """Return the log Z' at which the mean residual is 0: minus the mean of `partial`, weighted by `weight` (m).

    All tensors are [B]; kept: bool, and at least one is True. For LA-TB at step 0, where S = S_ref, the value is
    (alpha - 1) * mean over responses of S_ref / n + alpha * mean psi + mean reward. A wrong fixed log Z' is a bias on
    length, quadratic in n, so the head starts at this value and not at 0.
    """
    weight = torch.where(kept, weight, 0.0)
    return -float((weight * partial)[kept].sum() / weight.sum())
