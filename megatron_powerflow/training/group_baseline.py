"""What must be known of a whole group before any of its losses? Estimates of log Z', and advantages.

Both are made of the policy as it is now, so they cost a forward pass; a group is whole on its data-parallel rank. Where
it is whole in its micro-batch, its log Z' is estimated in the loss's own forward pass instead (`loss.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.objective.log_z_estimate import contrastive_log_z, group_log_z, loo_log_z
from megatron_powerflow.objective.objective import BalanceObjective, Objective, PolicyGradientObjective
from megatron_powerflow.objective.policy_gradient import group_advantage, power_reward
from megatron_powerflow.records import EstimatedBatch, MicroBatch, RewardedBatch, ScoredBatch, extended
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.residual import (
    importance_of,
    residual_weight,
    residual_without_log_z,
    sampler_weight_of,
)
from megatron_powerflow.training.score import score, score_certainty, scored_batches


def with_group_baseline(
    chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer, objective: Objective
) -> list[MicroBatch]:
    """Return the micro-batches of one update with what the objective needs of whole groups.

    They have it on the last stage. They are as they were where the objective needs nothing, or nothing yet, and on the
    other stages. Collective, as `run_forward` is.
    """
    if isinstance(objective, BalanceObjective):
        if objective.learns_log_z or all(batch.whole_groups for batch in batches):
            return list(batches)
        current = score(chunks, batches, scorer)
        if not scorer.groups.is_last_stage:
            return list(batches)
        return [*with_log_z(scored_batches(batches), _without_none(current), objective)]
    if isinstance(objective, PolicyGradientObjective):
        rewards = rewards_of(chunks, batches, scorer, objective)
        if not scorer.groups.is_last_stage:
            return list(batches)
        return [*_with_advantage(scored_batches(batches), rewards, objective)]
    return list(batches)


def rewards_of(
    chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer, objective: PolicyGradientObjective
) -> list[Tensor]:
    """Return the reward of each response: [b] for each micro-batch, on the last stage; an empty list elsewhere.

    It is the certainty (`score_certainty`), the reward of the text, or `power_reward`, by the objective. Collective, as
    `run_forward` is.
    """
    if objective.form.reward == "certainty":
        means = score_certainty(chunks, batches, scorer)
        return _without_none(means) if scorer.groups.is_last_stage else []
    if objective.alpha is None:
        return [batch.reward for batch in batches] if scorer.groups.is_last_stage else []
    current, alpha = score(chunks, batches, scorer), objective.alpha
    if not scorer.groups.is_last_stage:
        return []
    return [
        power_reward(
            log_probs.sum(dim=1),
            batch.ref_log_probs.sum(dim=1),
            batch.num_response_tokens,
            batch.psi,
            alpha,
            "length" if objective.form.per_length else "none",
        )
        for batch, log_probs in zip(scored_batches(batches), _without_none(current), strict=True)
    ]


def with_log_z(
    batches: Sequence[ScoredBatch], current: Sequence[Tensor], objective: BalanceObjective
) -> list[EstimatedBatch]:
    """Return the micro-batches, which hold whole groups together, with the estimates of log Z'.

    current: [b, s] detached log-probs of the policy, of each micro-batch.
    """
    if not any(len(batch.group) for batch in batches):  # dummies
        return [extended(batch, EstimatedBatch, log_z=batch.psi, weight_factor=batch.psi) for batch in batches]
    pairs = [(log_probs.sum(dim=1), batch) for log_probs, batch in zip(current, batches, strict=True)]
    arguments = (
        torch.cat([residual_without_log_z(sequence, batch, objective) for sequence, batch in pairs]),
        torch.cat([batch.group for batch in batches]),
        torch.cat([_weight_of(sequence, batch, objective) for sequence, batch in pairs]),
        torch.cat([batch.kept for batch in batches]),
    )
    if objective.log_z == "contrastive":
        log_z, factor = contrastive_log_z(*arguments)
    else:
        log_z = {"group": group_log_z, "loo": loo_log_z}[objective.log_z](*arguments)
        factor = torch.ones_like(log_z)
    sizes = [len(batch.group) for batch in batches]
    return [
        extended(batch, EstimatedBatch, log_z=own_log_z, weight_factor=own_factor)
        for batch, own_log_z, own_factor in zip(batches, log_z.split(sizes), factor.split(sizes), strict=True)
    ]


def _weight_of(sequence_log_prob: Tensor, batch: ScoredBatch, objective: BalanceObjective) -> Tensor:
    """Return the weight w v m of each rollout: [b]."""
    w, v = importance_of(sequence_log_prob, batch, objective), sampler_weight_of(sequence_log_prob, batch, objective)
    return w.weight * v.weight * residual_weight(batch, objective)


def _with_advantage(
    batches: Sequence[ScoredBatch], rewards: Sequence[Tensor], objective: PolicyGradientObjective
) -> list[RewardedBatch]:
    """Return the micro-batches with advantages over the plain means of their groups.

    A baseline need not be a mean under the policy, since any number that the response has no part in will do: so w and
    v, which text rewards would need a forward pass for, weigh the terms and not the mean.
    """
    advantage = group_advantage(
        torch.cat(list(rewards)),
        torch.cat([batch.group for batch in batches]),
        torch.cat([batch.kept for batch in batches]),
        divide_by_std=objective.form.divide_by_std,
    )
    sizes = [len(batch.group) for batch in batches]
    return [
        extended(batch, RewardedBatch, advantage=own, reward=reward)
        for batch, own, reward in zip(batches, advantage.split(sizes), rewards, strict=True)
    ]


def _without_none(values: Sequence[Tensor | None]) -> list[Tensor]:
    """Return the values that are not None; on the last stage these are all."""
    return [value for value in values if value is not None]
