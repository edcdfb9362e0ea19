"""How does one step's rollouts change the policy? The objective, put through Megatron's schedule.

    for each update: (log Z' of the groups) -> residuals, loss -> gradients -> optimizers

Left out: generating, reference scoring, metrics; they come before and after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_powerflow.checkpoint.state import Trainable
from megatron_powerflow.config import LEARNED_LOG_Z, ObjectiveSection, OptimizerSection
from megatron_powerflow.model.log_z_head import LogZHead, pool_prompt
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.objective.log_z_estimate import contrastive_log_z, group_log_z, loo_log_z
from megatron_powerflow.objective.trajectory_balance import (
    importance_weight,
    initial_log_z,
    la_tb_loss,
    partial_residual,
)
from megatron_powerflow.parallel.collectives import last_stage_rows
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import ROLLOUT_COLUMNS, MicroBatch
from megatron_powerflow.training.forward_step import Scorer, run_forward_backward
from megatron_powerflow.training.optimizer import Stepped, step_optimizers
from megatron_powerflow.training.score import score, score_old


@dataclass(frozen=True)
class Updated:
    """rows: [B, len(ROLLOUT_COLUMNS)] fp64, one per rollout of the step, sorted by rollout_index, on every rank."""

    rows: Tensor
    steps: tuple[Stepped, ...]


def update(
    trainable: Trainable,
    updates: Sequence[Sequence[MicroBatch]],
    scorer: Scorer,
    objective: ObjectiveSection,
    section: OptimizerSection,
) -> Updated:
    """One optimizer update per element of `updates`: micro-batches of whole groups, reference scored."""
    groups = scorer.groups
    sampled_by = [list(batches) for batches in updates]
    if objective.ratio != "none" and len(updates) > 1:
        sampled_by = [score_old(trainable.chunks, batches, scorer) for batches in sampled_by]
    rows, steps = [], []
    for number, batches in enumerate(sampled_by):
        num_kept = _num_kept(batches, groups)
        if objective.log_z not in LEARNED_LOG_Z:
            batches = _with_group_log_z(trainable.chunks, batches, scorer, objective, scored=number == 0)
        trainable.zero_grad()

        def loss_and_rows(hidden: Tensor, chunk: PolicyModel, batch: MicroBatch, num_kept=num_kept):
            return micro_batch_loss(hidden, chunk, batch, scorer, objective, trainable.head, num_kept)

        found = run_forward_backward(trainable.ddp_chunks, batches, scorer, loss_and_rows)
        num_rollouts = sum(batch.tokens.shape[0] for batch in batches)
        table = last_stage_rows(torch.cat(found).cpu() if found else None, num_rollouts, len(ROLLOUT_COLUMNS), groups)
        finite = bool(table[:, ROLLOUT_COLUMNS.index("residual")].isfinite().all()) and num_kept > 0
        steps.append(step_optimizers(trainable, clip_grad=section.clip_grad, loss_is_finite=finite, groups=groups))
        rows.append(table)
    everything = torch.cat(rows)
    return Updated(everything[everything[:, 0].argsort()], tuple(steps))


def micro_batch_loss(
    hidden: Tensor,
    chunk: PolicyModel,
    batch: MicroBatch,
    scorer: Scorer,
    objective: ObjectiveSection,
    head: LogZHead | None,
    num_kept: int,
) -> tuple[Tensor, Tensor]:
    """(this micro-batch's share of the step's loss, its rows [b, len(ROLLOUT_COLUMNS)] fp64 detached)."""
    log_probs = scorer.log_probs(hidden, chunk, batch)
    sequence, reference = log_probs.sum(dim=1), batch.ref_log_probs.sum(dim=1)
    num_tokens = batch.num_response_tokens
    old = batch.old_log_probs.sum(dim=1) if batch.old_log_probs is not None else sequence.detach()
    weight, ratio = importance_weight(
        sequence, old, num_tokens, ratio=objective.ratio, clip_epsilon=objective.clip_epsilon or 0.0
    )
    log_z = batch.log_z
    if head is not None:
        log_z = head(pool_prompt(hidden, batch.prompt_mask))
    if batch.weight_factor is not None:
        weight = weight * batch.weight_factor
    partial = partial_residual(sequence, reference, num_tokens, batch.psi, objective.alpha)
    loss, residual = la_tb_loss(partial, log_z, weight, batch.kept, max(num_kept, 1))
    gap = (log_probs.detach() - batch.rollout_log_probs).abs()
    columns = {
        "rollout_index": batch.rollout_index,
        "num_prompt_tokens": batch.prompt_mask.sum(dim=1),
        "num_response_tokens": num_tokens,
        "sequence_log_prob": sequence,
        "ref_sequence_log_prob": reference,
        "rollout_sequence_log_prob": batch.rollout_log_probs.sum(dim=1),
        "log_z": log_z,
        "psi": batch.psi,
        "boxed": batch.boxed,
        "residual": residual,
        "weight": weight,
        "ratio": ratio,
        "kept": batch.kept,
        "truncated": batch.truncated,
        "sampler_gap_sum": gap.sum(dim=1),
        "sampler_gap_max": gap.amax(dim=1),
        "max_log_prob": _max_where(log_probs, batch.loss_mask),
    }
    return loss, torch.stack([columns[name].detach().double() for name in ROLLOUT_COLUMNS], dim=1)


def calibrated_log_z(batches: Sequence[MicroBatch], objective: ObjectiveSection, groups: Groups) -> float:
    """The head's start value from the first batch's reference scores, over all ranks."""
    local = None
    if groups.is_last_stage:
        local = torch.cat(
            [
                torch.stack([batch.ref_log_probs.sum(dim=1), batch.num_response_tokens, batch.psi, batch.kept], dim=1)
                for batch in batches
            ]
        )
        local = local.double().cpu()
    num_rollouts = sum(batch.tokens.shape[0] for batch in batches)
    reference, num_tokens, psi, kept = last_stage_rows(local, num_rollouts, 4, groups).unbind(dim=1)
    if not kept.any():
        return 0.0
    return initial_log_z(reference, num_tokens, psi, kept.bool(), objective.alpha)


def _with_group_log_z(
    chunks: Sequence[PolicyModel],
    batches: Sequence[MicroBatch],
    scorer: Scorer,
    objective: ObjectiveSection,
    *,
    scored: bool,
) -> list[MicroBatch]:
    """The micro-batches with log_z and weight_factor, estimated with the policy as it is now.

    scored: old_log_probs, where there are any, are the current policy's (the first update of a step).
    """
    current = [batch.old_log_probs for batch in batches]
    if not scored or batches[0].old_log_probs is None:
        current = score(chunks, batches, scorer)
    if not scorer.groups.is_last_stage:
        return list(batches)
    sizes = [batch.tokens.shape[0] for batch in batches]

    def joined(values) -> Tensor:
        return torch.cat(list(values))

    sequence = joined(values.sum(dim=1) for values in current)
    num_tokens = joined(batch.num_response_tokens for batch in batches)
    old = joined(b.old_log_probs.sum(dim=1) for b in batches) if batches[0].old_log_probs is not None else sequence
    weight, _ = importance_weight(
        sequence, old, num_tokens, ratio=objective.ratio, clip_epsilon=objective.clip_epsilon or 0.0
    )
    partial = partial_residual(
        sequence,
        joined(batch.ref_log_probs.sum(dim=1) for batch in batches),
        num_tokens,
        joined(batch.psi for batch in batches),
        objective.alpha,
    )
    arguments = (partial, joined(b.group for b in batches), weight, joined(b.kept for b in batches))
    if objective.log_z == "contrastive":
        log_z, factor = contrastive_log_z(*arguments)
    else:
        log_z = {"group": group_log_z, "loo": loo_log_z}[objective.log_z](*arguments)
        factor = torch.ones_like(log_z)
    return [
        replace(batch, log_z=own_log_z, weight_factor=own_factor)
        for batch, own_log_z, own_factor in zip(batches, log_z.split(sizes), factor.split(sizes), strict=True)
    ]


def _num_kept(batches: Sequence[MicroBatch], groups: Groups) -> int:
    """Rollouts of this update that take part, over all data-parallel ranks: the denominator of the loss."""
    count = torch.stack([batch.kept.sum() for batch in batches]).sum()
    dist.all_reduce(count, group=groups.dp)
    return int(count)


def _max_where(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, -torch.inf).amax(dim=1)
