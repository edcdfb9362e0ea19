"""How does a reward move the policy? By its advantage within the group and a clipped surrogate, pure functions of [B].

    loss = (1/B) * sum_b -A_b * S_b / a_b       on policy; with a ratio, PPO's clipped surrogate (arXiv 1707.06347)

The gradient of every variant at ratio 1 is -A * dS / a. B counts the rollouts kept in the whole step.

Left out: rewards made of text (`training/rewards.py`) and the target's log-probs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_powerflow.objective.presets import Norm, Ratio


def power_reward(
    sequence_log_prob: Tensor, ref_sequence_log_prob: Tensor, num_tokens: Tensor, psi: Tensor, alpha: float, norm: Norm
) -> Tensor:
    """Return the reward R = (alpha * S_ref - S) / a + alpha * psi: [B], detached.

    It is the log-ratio of target and policy, whose expectation is minus their KL divergence. All tensors are [B].
    norm "length": a = n (RL-token); "none": a = 1 (RL-traj).
    """
    reward = alpha * ref_sequence_log_prob - sequence_log_prob
    if norm == "length":
        reward = reward / num_tokens
    return (reward + alpha * psi).detach()


def group_advantage(reward: Tensor, group: Tensor, kept: Tensor, *, divide_by_std: bool) -> Tensor:
    """Return the reward minus the mean of its group's kept members: [B], detached.

    reward: [B]; group: [B] int64; kept: [B] bool. divide_by_std: divide by the group's std + 1e-6, the std over G - 1
    as torch.std has it (verl's compute_grpo_outcome_advantage). Dropped rollouts and those whose group keeps no other
    have an advantage of 0.
    """
    _, group_index = group.unique(return_inverse=True)
    reward = torch.where(kept, reward, 0.0).detach()

    def per_group(values: Tensor) -> Tensor:
        return values.new_zeros(int(group_index.max()) + 1).index_add_(0, group_index, values)[group_index]

    count = per_group(kept.to(reward.dtype))
    centred = torch.where(kept, reward - per_group(reward) / count.clamp(min=1), 0.0)
    if divide_by_std:
        std = (per_group(centred.square()) / (count - 1).clamp(min=1)).sqrt()
        centred = centred / (std + 1e-6)
    return torch.where(count > 1, centred, 0.0)


class SurrogateTerms(NamedTuple):
    """terms: [B], whose sum / B is the loss. ratio: [B] of the sequence, detached. clipped: [B], 0 or 1, or the share
    of clipped tokens. importance: [B], detached: v times the clipped ratio, of tokens their mean."""

    terms: Tensor
    ratio: Tensor
    clipped: Tensor
    importance: Tensor


def surrogate_terms(
    log_probs: Tensor,
    old_log_probs: Tensor,
    mask: Tensor,
    advantage: Tensor,
    num_tokens: Tensor,
    *,
    ratio: Ratio,
    score_norm: Norm,
    clip_epsilon: float,
    upper_only: bool = False,
    sampler_weight: Tensor | None = None,
) -> SurrogateTerms:
    """Compute each response's term of the policy-gradient loss, by the kind of `ratio`:

    none:      -A * S / a
    seq:       -min(rho A, clip(rho) A) / a                  rho = exp(S - S_old)
    seq_mean:  -min(rho A, clip(rho) A) * n / a              rho = exp((S - S_old) / n), GSPO (arXiv 2507.18071)
    token:     -sum_t min(rho_t A, clip(rho_t) A) / a        rho_t = pi_t / pi_old,t, GRPO

    log_probs, old_log_probs: [B, s], 0 where mask is False; mask: [B, s] bool, True on response tokens; advantage,
    num_tokens: [B]. a is n with score_norm "length", else 1. upper_only: clip(rho) = min(rho, 1 + eps). Only log_probs
    carries gradient. sampler_weight: v, by which a term is multiplied, [B]; or each token's in the sum of `none` or
    `token`, [B, s], 1 where masked; None: 1.
    """
    assert sampler_weight is None or sampler_weight.dim() == 1 or ratio in ("none", "token"), "no sum over tokens"
    v = torch.ones_like(advantage) if sampler_weight is None else sampler_weight
    of_response, of_token = (v, torch.ones_like(v)[:, None]) if v.dim() == 1 else (torch.ones_like(advantage), v)
    difference = log_probs - old_log_probs
    sequence_ratio = difference.detach().sum(dim=1).exp()
    divisor = num_tokens if score_norm == "length" else torch.ones_like(advantage)
    if ratio == "none":
        terms = -advantage * (of_token * log_probs).sum(dim=1) / divisor * of_response
        mean = torch.where(mask, of_token, 0.0).sum(dim=1) / num_tokens
        return SurrogateTerms(terms, sequence_ratio, torch.zeros_like(sequence_ratio), mean * of_response)
    low, high = 0.0 if upper_only else 1.0 - clip_epsilon, 1.0 + clip_epsilon

    def clipped(rho: Tensor, advantage: Tensor) -> Tensor:
        return -torch.minimum(rho * advantage, rho.clamp(low, high) * advantage)

    def outside(rho: Tensor) -> Tensor:
        return ((rho < low) | (rho > high)).to(sequence_ratio.dtype)

    if ratio == "seq":
        rho = difference.sum(dim=1).exp()
        terms, bounded = clipped(rho, advantage) / divisor * v, sequence_ratio.clamp(low, high)
        return SurrogateTerms(terms, sequence_ratio, outside(sequence_ratio), bounded * v)
    if ratio == "seq_mean":
        rho = (difference.sum(dim=1) / num_tokens).exp()
        terms = clipped(rho, advantage) * num_tokens / divisor * v
        return SurrogateTerms(terms, rho.detach(), outside(rho.detach()), rho.detach().clamp(low, high) * v)
    rho = difference.exp()
    terms = torch.where(mask, of_token * clipped(rho, advantage[:, None]), 0.0).sum(dim=1) / divisor * of_response
    share = torch.where(mask, outside(rho.detach()), 0.0).sum(dim=1) / num_tokens
    mean = torch.where(mask, of_token * rho.detach().clamp(low, high), 0.0).sum(dim=1) / num_tokens
    return SurrogateTerms(terms, sequence_ratio, share, mean * of_response)


def kl_terms(log_probs: Tensor, ref_log_probs: Tensor, num_tokens: Tensor) -> Tensor:
    """Return the mean over a response's tokens of exp(d) - d - 1 with d = log p_ref,t - log pi_t: [B].

    It estimates KL(pi || p_ref) and is never negative ("k3", joschu.net/blog/kl-approx.html; the KL term of GRPO).
    log_probs, ref_log_probs: [B, s], 0 where masked; num_tokens: [B].
    """
    difference = ref_log_probs - log_probs
    return (difference.exp() - difference - 1.0).sum(dim=1) / num_tokens
