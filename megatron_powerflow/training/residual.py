"""What is the residual of each rollout in a micro-batch, and how much does it weigh? Eq. 10 on our records.

Left out: the formulas (`objective/trajectory_balance.py`), log Z' (`group_baseline.py`, `model/log_z_head.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_powerflow.config import ObjectiveSection
from megatron_powerflow.objective.presets import Balance
from megatron_powerflow.objective.trajectory_balance import importance_weight, partial_residual
from megatron_powerflow.records import MicroBatch


def tilt_length(batch: MicroBatch, objective: ObjectiveSection) -> Tensor:
    """[b] the length that the residual divides by: n, or min(n, tilt_cap)."""
    if objective.tilt_cap is None:
        return batch.num_response_tokens
    return batch.num_response_tokens.clamp(max=objective.tilt_cap)


def residual_weight(batch: MicroBatch, form: Balance) -> Tensor:
    """[b] m: 1, or the number of response tokens."""
    return batch.num_response_tokens.to(batch.psi.dtype) if form.weight == "length" else torch.ones_like(batch.psi)


def partial_of(
    sequence_log_prob: Tensor, batch: MicroBatch, objective: ObjectiveSection, form: Balance, alpha: float
) -> Tensor:
    """[b] `partial_residual` of a micro-batch, given the policy's sequence log-probs."""
    return partial_residual(
        sequence_log_prob,
        batch.ref_log_probs.sum(dim=1),
        tilt_length(batch, objective),
        batch.psi,
        alpha,
        policy_norm=form.policy_norm,
        reference_norm=form.reference_norm,
        reward=batch.reward,
    )


def weight_of(sequence_log_prob: Tensor, batch: MicroBatch, objective: ObjectiveSection):
    """(w, ratio) [b] of a micro-batch; the old policy is the current one where no other was scored."""
    old = batch.old_log_probs.sum(dim=1) if batch.old_log_probs is not None else sequence_log_prob.detach()
    return importance_weight(
        sequence_log_prob,
        old,
        batch.num_response_tokens,
        ratio=objective.ratio,
        clip_epsilon=objective.clip_epsilon or 0.0,
        upper_only=objective.clip == "upper",
    )
