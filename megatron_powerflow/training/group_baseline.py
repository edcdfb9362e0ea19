"""What must be known of a whole group before any of its losses? log Z' estimates and advantages.

Both are made of the policy as it is now, so they cost a forward pass; a group is whole on its data-parallel rank. Where
it is whole in its micro-batch, its log Z' is estimated in the loss's own forward pass instead (`loss.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_powerflow.config import ObjectiveSection
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.objective.log_z_estimate import contrastive_log_z, group_log_z, loo_log_z
from megatron_powerflow.objective.policy_gradient import group_advantage, power_reward
from megatron_powerflow.objective.presets import Balance, Norm, PolicyGradient
from megatron_powerflow.records import MicroBatch
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.residual import partial_of, residual_weight, weight_of
from megatron_powerflow.training.score import score, score_certainty


def with_group_values(
    chunks: Sequence[PolicyModel],
    batches: Sequence[MicroBatch],
    scorer: Scorer,
    objective: ObjectiveSection,
    alpha: float,
) -> list[MicroBatch]:
    """The micro-batches with what their form needs, on the last stage; as they were where it needs nothing."""
    form = objective.form
    if isinstance(form, Balance) and not objective.learns_log_z:
        if all(batch.whole_groups for batch in batches):
            return list(batches)
        return with_log_z(batches, score(chunks, batches, scorer), objective, form, alpha)
    if isinstance(form, PolicyGradient):
        if form.reward == "certainty":
            means = score_certainty(chunks, batches, scorer)
            return _with_advantage(batches, means, form) if scorer.groups.is_last_stage else list(batches)
        if not form.powers:
            return _with_advantage(batches, [batch.reward for batch in batches], form)
        current = score(chunks, batches, scorer)
        norm: Norm = "length" if form.reward == "power_per_token" else "none"
        if not scorer.groups.is_last_stage:
            return list(batches)
        rewards = [
            power_reward(log_probs.sum(dim=1), b.ref_log_probs.sum(dim=1), b.num_response_tokens, b.psi, alpha, norm)
            for b, log_probs in zip(batches, current, strict=True)
        ]
        return _with_advantage(batches, rewards, form)
    return list(batches)


def with_log_z(
    batches: Sequence[MicroBatch],
    current: Sequence[Tensor | None],
    objective: ObjectiveSection,
    form: Balance,
    alpha: float,
) -> list[MicroBatch]:
    """The micro-batches, of whole groups together, with the estimates of log Z'. current: [b, s] detached log-probs of
    the policy; None where there are none (no last stage), and then nothing is added."""
    if current[0] is None:
        return list(batches)
    if not any(len(batch.group) for batch in batches):  # a dummy
        return [replace(batch, log_z=batch.psi, weight_factor=batch.psi) for batch in batches]
    sequences = [log_probs.sum(dim=1) for log_probs in current]
    pairs = list(zip(sequences, batches, strict=True))
    arguments = (
        torch.cat([partial_of(sequence, batch, objective, form, alpha) for sequence, batch in pairs]),
        torch.cat([batch.group for batch in batches]),
        torch.cat([weight_of(s, b, objective).weight * residual_weight(b, form) for s, b in pairs]),
        torch.cat([batch.kept for batch in batches]),
    )
    if objective.log_z == "contrastive":
        log_z, factor = contrastive_log_z(*arguments)
    else:
        log_z = {"group": group_log_z, "loo": loo_log_z}[objective.log_z](*arguments)
        factor = torch.ones_like(log_z)
    sizes = [len(batch.group) for batch in batches]
    return [
        replace(batch, log_z=own_log_z, weight_factor=own_factor)
        for batch, own_log_z, own_factor in zip(batches, log_z.split(sizes), factor.split(sizes), strict=True)
    ]


def _with_advantage(batches: Sequence[MicroBatch], rewards: Sequence[Tensor], form: PolicyGradient) -> list[MicroBatch]:
    advantage = group_advantage(
        torch.cat(list(rewards)),
        torch.cat([batch.group for batch in batches]),
        torch.cat([batch.kept for batch in batches]),
        divide_by_std=form.divide_by_std,
    )
    sizes = [len(batch.group) for batch in batches]
    return [
        replace(batch, advantage=own, reward=reward)
        for batch, own, reward in zip(batches, advantage.split(sizes), rewards, strict=True)
    ]
