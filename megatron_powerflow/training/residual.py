"""What is the residual of each rollout in a micro-batch, and how much does it weigh? Equation 10 on our records.

Left out: the formulas (`objective/trajectory_balance.py`), log Z' (`group_baseline.py`, `model/log_z_head.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_powerflow.objective.objective import BalanceObjective
from megatron_powerflow.objective.sampler_weight import SamplerWeight, sampler_weight
from megatron_powerflow.objective.trajectory_balance import Weight, importance_weight, partial_residual
from megatron_powerflow.records import ScoredBatch


def residual_without_log_z(sequence_log_prob: Tensor, batch: ScoredBatch, objective: BalanceObjective) -> Tensor:
    """Return the residual without log Z' of each rollout in a micro-batch (`partial_residual`): [b].

    sequence_log_prob: [b], by the policy.
    """
    return partial_residual(
        sequence_log_prob,
        batch.ref_log_probs.sum(dim=1),
        tilt_length(batch, objective),
        batch.psi,
        objective.alpha,
        policy_norm=objective.form.policy_norm,
        reference_norm=objective.form.reference_norm,
        reward=batch.reward,
    )


def tilt_length(batch: ScoredBatch, objective: BalanceObjective) -> Tensor:
    """Return the length that the residual divides by: [b], n or min(n, tilt_cap)."""
    if objective.tilt_cap is None:
        return batch.num_response_tokens
    return batch.num_response_tokens.clamp(max=objective.tilt_cap)


def residual_weight(batch: ScoredBatch, objective: BalanceObjective) -> Tensor:
    """Return the weight m of each residual: [b], 1 or the number of response tokens."""
    if objective.form.weight == "length":
        return batch.num_response_tokens.to(batch.psi.dtype)
    return torch.ones_like(batch.psi)


def importance_of(sequence_log_prob: Tensor, batch: ScoredBatch, objective: BalanceObjective) -> Weight:
    """Return the importance weight w of each rollout and its ratio before clipping, each [b].

    sequence_log_prob: [b], by the policy.
    """
    old, rule = old_sequence_log_prob(sequence_log_prob, batch), objective.importance
    return importance_weight(
        sequence_log_prob,
        old,
        batch.num_response_tokens,
        ratio=rule.ratio,
        clip_epsilon=rule.epsilon,
        upper_only=rule.upper_only,
    )


def sampler_weight_of(sequence_log_prob: Tensor, batch: ScoredBatch, objective: BalanceObjective) -> SamplerWeight:
    """Return the weight v of each rollout for its sampler's sake, and whether it was truncated, each [b].

    sequence_log_prob: [b], by the policy.
    """
    old, rule = old_sequence_log_prob(sequence_log_prob, batch), objective.sampler
    sampler, num_tokens = batch.rollout_log_probs.sum(dim=1), batch.num_response_tokens
    return sampler_weight(old, sampler, num_tokens, ratio=rule.ratio, cap=rule.cap)


def old_sequence_log_prob(sequence_log_prob: Tensor, batch: ScoredBatch) -> Tensor:
    """Return S_old of each rollout: [b], detached.

    sequence_log_prob: [b], by the policy, which is the old one where no other was scored.
    """
    return batch.old_log_probs.sum(dim=1) if batch.old_log_probs is not None else sequence_log_prob.detach()
