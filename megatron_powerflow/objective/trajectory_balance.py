"""What is the loss of a batch of responses? Trajectory balance in all its normalisations, as pure functions of [B].

    delta_b = log_z[g(b)] + S_b / a_b - alpha * S_ref,b / c_b - alpha * psi_b - r_b
    loss    = (1/B) * sum_b w_b * m_b * delta_b^2                         (Eq. 10, arXiv 2603.18363: a = c = n, m = 1)

B counts the rollouts kept in the whole step, over all ranks and micro-batches; it is an argument. `length` is n, the
response's tokens with EOS, or min(n, M) under a tilt cap: the fixed point is then p_base^alpha exp(-lambda min(n, M)).

Laws, each tested by name:
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
    """[B] the residual without log Z'. reward: the task's, times its scale; like psi it is not divided by a length.

    With both norms "length" this is (S - alpha * S_ref) / n - alpha * psi - reward, in one division.
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
    """[B] variance over a response's tokens of x_t = log pi_t - alpha * log p_base,t.

    mean_t (log_z + x_t)^2 = (log_z + mean x)^2 + variance: the per-token loss is the sequence's residual squared plus
    this. All [B, s], zero where masked; mask True on response tokens.
    """
    excess = torch.where(mask, log_probs - alpha * ref_log_probs, 0.0)
    count = mask.sum(dim=1)
    mean = excess.sum(dim=1) / count
    return torch.where(mask, excess - mean[:, None], 0.0).square().sum(dim=1) / count


class Weight(NamedTuple):
    """w: [B] clipped, detached; ratio: [B] before clipping."""

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
    """w = clip(exp(S - S_old), 1 - eps, 1 + eps), detached. `seq_mean` takes (S - S_old) / n instead (GSPO).

    Over 900 tokens a whole-sequence ratio leaves [0.8, 1.2] at a mean drift of 2.5e-4 a token: see the clip
    fraction in the metrics. `none`: 1. upper_only: min(ratio, 1 + eps), as in GFlowRL (arXiv 2607.13394).
    """
    if ratio == "none":
        ones = torch.ones_like(sequence_log_prob.detach())
        return Weight(ones, ones)
    difference = (sequence_log_prob - old_sequence_log_prob).detach()
    if ratio == "seq_mean":
        difference = difference / num_tokens
    exact = difference.exp()
    return Weight(exact.clamp(0.0 if upper_only else 1.0 - clip_epsilon, 1.0 + clip_epsilon), exact)


class Loss(NamedTuple):
    """loss: scalar, this call's share of the step's loss; residual: [B]; terms: [B], whose sum / B is the loss."""

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
    """sum of w * (delta^2 + spread) over the kept rollouts here / kept rollouts of the global batch (Eq. 10).

    partial: `partial_residual`; log_z carries gradient from the head, or none from a group estimate; weight: w * m;
    spread: `token_spread` for the per-token loss. All [B].
    """
    residual = log_z + partial
    terms = torch.where(kept, weight.detach() * (residual.square() + spread), 0.0)
    return Loss(terms.sum() / num_kept, residual, terms)


def initial_log_z(partial: Tensor, weight: Tensor, kept: Tensor) -> float:
    """The value at which the mean residual is 0: minus the mean of `partial`, weighted by m. At step 0, where
    S = S_ref, that is (alpha - 1) * mean over responses of S_ref / n + alpha * mean psi.

    A wrong fixed log Z' is a bias on length, quadratic in n, so the head starts here and not at 0.
    """
    weight = torch.where(kept, weight, 0.0)
    return -float((weight * partial)[kept].sum() / weight.sum())
