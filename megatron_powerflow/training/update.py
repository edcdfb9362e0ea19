"""How do the rollouts of a step change the policy? The objective, put through Megatron's schedule.

    for each update: (what needs whole groups) -> loss -> gradients -> optimizers

Left out: generating, reference scoring, metrics; they come before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_powerflow.checkpoint.state import Trainable
from megatron_powerflow.config import OptimizerSection
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.objective.objective import BalanceObjective, Objective
from megatron_powerflow.objective.trajectory_balance import initial_log_z
from megatron_powerflow.parallel.collectives import last_stage_rows
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import ROLLOUT_COLUMNS, MicroBatch, ScoredBatch
from megatron_powerflow.training.forward_step import Scorer, run_forward, run_forward_backward
from megatron_powerflow.training.group_baseline import with_group_baseline
from megatron_powerflow.training.loss import micro_batch_loss, with_loops
from megatron_powerflow.training.optimizer import OptimizerStep, step_optimizers
from megatron_powerflow.training.residual import residual_weight, residual_without_log_z
from megatron_powerflow.training.score import score_old, scored_batches, with_saved_old
from megatron_powerflow.training.staleness import SampledBy


@dataclass(frozen=True)
class UpdateResult:
    """What the updates of a step give beside the changed weights.

    rows: [B, len(ROLLOUT_COLUMNS)] fp64, one per rollout of the step, sorted by rollout_index, on every rank.
    optimizer_steps: one per update.
    """

    rows: Tensor
    optimizer_steps: tuple[OptimizerStep, ...]


def update(
    trainable: Trainable,
    updates: Sequence[Sequence[MicroBatch]],
    scorer: Scorer,
    objective: Objective,
    section: OptimizerSection,
    *,
    sampled_by: SampledBy = SampledBy.OWN,
    inspect: Callable[[Tensor], None] | None = None,
) -> UpdateResult:
    """Make one optimizer update for each element of `updates`. Collective over the run.

    updates: of each, this rank's micro-batches, scored by the reference, which together hold whole groups. sampled_by:
    says what `old_log_probs` are to be. inspect: is given the rows of the first update before anything moves, alike on
    every rank, and may raise.
    """
    groups = scorer.groups
    with_old = [list(batches) for batches in updates]
    if sampled_by.old_is_scored:  # the first update's forward pass is of the old policy; the later ones find it changed
        with_old[1:] = [score_old(trainable.chunks, batches, scorer) for batches in with_old[1:]]
    else:
        with_old = [with_saved_old(batches) for batches in with_old]
    tables: list[Tensor] = []
    optimizer_steps = []
    for batches in with_old:
        num_kept = _num_kept(batches, groups)
        batches = with_group_baseline(trainable.chunks, batches, scorer, objective)
        trainable.zero_grad()

        def loss_and_rows(hidden: Tensor, chunk: PolicyModel, batch: MicroBatch, num_kept=num_kept):
            assert isinstance(batch, ScoredBatch)
            return micro_batch_loss(hidden, chunk, batch, scorer, objective, trainable.head, num_kept)

        tables_of_batches = run_forward_backward(trainable.ddp_chunks, batches, scorer, loss_and_rows)
        num_rollouts = sum(batch.tokens.shape[0] for batch in batches)
        local = None
        if tables_of_batches:
            local = with_loops(torch.cat(tables_of_batches).cpu(), scored_batches(batches))
        table = last_stage_rows(local, num_rollouts, len(ROLLOUT_COLUMNS), groups)
        if inspect is not None and not tables:
            inspect(table)
        finite = bool(table[:, ROLLOUT_COLUMNS.index("loss_term")].isfinite().all()) and num_kept > 0
        mean_weight = _mean_weight(table)
        optimizer_steps.append(
            step_optimizers(
                trainable,
                clip_grad=section.clip_grad,
                mean_weight=mean_weight,
                loss_is_finite=finite,
                groups=groups,
            )
        )
        tables.append(table)
    everything = torch.cat(tables)
    return UpdateResult(everything[everything[:, 0].argsort()], tuple(optimizer_steps))


def calibrate_head(
    trainable: Trainable,
    updates: Sequence[Sequence[MicroBatch]],
    objective: BalanceObjective,
    scorer: Scorer,
) -> float:
    """Give the head its start value, and return it. Collective over the run.

    It is minus the mean residual of the first step's rollouts without log Z', over all ranks, with S = S_ref
    (`initial_log_z`); 0 where no rollout is kept. A head that reads prompts also learns what all of them share.
    """
    local, groups = None, scorer.groups
    batches = [batch for of_update in updates for batch in of_update]
    if objective.log_z == "mlp":
        _centre_head(trainable, updates, scorer)
    if groups.is_last_stage:
        local = torch.cat(
            [
                torch.stack(
                    [
                        residual_without_log_z(batch.ref_log_probs.sum(dim=1), batch, objective),
                        residual_weight(batch, objective),
                        batch.kept,
                    ],
                    dim=1,
                )
                for batch in scored_batches(batches)
            ]
        )
        local = local.double().cpu()
    num_rollouts = sum(batch.tokens.shape[0] for batch in batches)
    partial, weight, kept = last_stage_rows(local, num_rollouts, 3, groups).unbind(dim=1)
    log_z = initial_log_z(partial, weight, kept.bool()) if kept.any() else 0.0
    if trainable.head is not None:
        trainable.head.calibrate(log_z)
    return log_z


def _centre_head(trainable: Trainable, updates: Sequence[Sequence[MicroBatch]], scorer: Scorer) -> None:
    """Centre the head by the prompts of all ranks (`LogZHead.centre`).

    One forward pass is made per update, since each is padded by itself and an interleaved schedule takes micro-batches
    of one shape only.
    """

    def mean(values: Tensor) -> Tensor:
        sums = torch.cat([values.double().sum(dim=0), values.new_tensor([len(values)], dtype=torch.float64)])
        dist.all_reduce(sums, group=scorer.groups.dp)
        return sums[:-1] / sums[-1]

    pools = [
        pool
        for batches in updates
        for pool in run_forward(
            trainable.chunks, batches, scorer, lambda hidden, _, batch: scorer.prompt_pool(hidden, batch)
        )
    ]
    if trainable.head is not None:
        trainable.head.centre(torch.cat(pools), mean)


def _mean_weight(table: Tensor) -> float:
    """Return the mean of the loss's weight w v m over the kept rollouts of all ranks; 0 when none was kept."""
    weight, kept = (table[:, ROLLOUT_COLUMNS.index(name)] for name in ("weight", "kept"))
    return float(weight[kept > 0].sum() / (kept > 0).sum().clamp(min=1))


def _num_kept(batches: Sequence[MicroBatch], groups: Groups) -> int:
    """Count the rollouts of this update that take part, over all data-parallel ranks.

    It is the denominator of the loss.
    """
    count = torch.stack([batch.kept.sum() for batch in batches]).sum()
    dist.all_reduce(count, group=groups.dp)
    return int(count)
