"""How much does a response weigh that another sampler drew than the policy at the start of its step?

Three policies have a log-prob for each token: the sampler, the trainer at the start of the step, the policy as it is.

    v = min(trainer at the start / sampler, cap)     here: other kernels, another dtype, older weights
    w = clip(policy / trainer at the start)          `importance_weight`, `surrogate_terms`: updates of one step

The loss of a response is multiplied by v w. Truncation from above keeps v's variance finite at the price of a bias
(truncated importance sampling, Ionides 2008, doi 10.1198/106186008X320456). No gradient goes through v.

Left out: who scored which log-probs (`training/residual.py`, `training/loss.py`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_powerflow.objective.presets import Ratio


class SamplerWeight(NamedTuple):
    """The weight of each response for its sampler's sake, detached.

    weight: [B] v, or of `sampler_token_weight` [B, s]. truncated: [B], 1 where v was above the cap, or the share of the
    response's tokens that were.
    """

    weight: Tensor
    truncated: Tensor


def sampler_weight(
    old_sequence_log_prob: Tensor, rollout_sequence_log_prob: Tensor, num_tokens: Tensor, *, ratio: Ratio, cap: float
) -> SamplerWeight:
    """Return v = min(exp(S_old - S_sampler), cap) of each response, detached.

    All tensors are [B]: S_old is by the trainer at the start of the step. ratio: "seq" as above; "seq_mean" takes
    (S_old - S_sampler) / n; "none": v is 1. cap: at least 1.
    """
    assert ratio != "token", "sampler_token_weight"
    difference = (old_sequence_log_prob - rollout_sequence_log_prob).detach()
    if ratio == "none":
        return SamplerWeight(torch.ones_like(difference), torch.zeros_like(difference))
    if ratio == "seq_mean":
        difference = difference / num_tokens
    untruncated = difference.exp()
    return SamplerWeight(untruncated.clamp(max=cap), (untruncated > cap).to(difference.dtype))


def sampler_token_weight(
    old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor, num_tokens: Tensor, *, cap: float
) -> SamplerWeight:
    """Return v_t = min(pi_old,t / pi_sampler,t, cap) of each token, detached; 1 where masked.

    old_log_probs, rollout_log_probs: [B, s]; mask: [B, s] bool, True on response tokens; num_tokens: [B]. cap: at least
    1. It is for losses that are sums over tokens (`surrogate_terms`).
    """
    untruncated = torch.where(mask, old_log_probs - rollout_log_probs, 0.0).detach().exp()
    share = (untruncated > cap).sum(dim=1) / num_tokens
    return SamplerWeight(untruncated.clamp(max=cap), share.to(untruncated.dtype))
