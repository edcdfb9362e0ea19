"""What is one step of PowerFlow? Rollouts, micro-batches, reference scores, and updates towards the target.

    prompts --sample--> rollouts --pack--> micro-batches --reference--> scored --update--> other weights, and rows

`train.py` calls `run_step`; whoever has rollouts of its own, such as a benchmark, calls `learn`.

Left out: what each line stands for, and what comes of a step: metrics (`run_output.py`), checkpoints (`train.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_powerflow.objective.objective import BalanceObjective
from megatron_powerflow.parallel.device_memory import give_back
from megatron_powerflow.records import MicroBatch, Prompt, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import ProgressCallback
from megatron_powerflow.rollout.sampling_params import sampling_params
from megatron_powerflow.training.first_batch import Inspect, inspection, require_scores_of_base
from megatron_powerflow.training.micro_batches import pack_updates
from megatron_powerflow.training.objective_of_step import objective_of_step
from megatron_powerflow.training.optimizer import OptimizerStep, set_learning_rates
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.score import score_reference
from megatron_powerflow.training.session import Session
from megatron_powerflow.training.step_rollouts import step_rollouts
from megatron_powerflow.training.update import calibrate_head, update

Phase = Callable[[str], AbstractContextManager]  # a phase of the step by its name, for whoever shows or times them


@dataclass(frozen=True)
class StepResult:
    """What a step gives beside the changed weights.

    rows: [B, len(ROLLOUT_COLUMNS)] fp64, one per rollout of the step, by rollout_index, on every rank. lr: the policy's
    learning rate. alpha: the power that the step aimed at, None where the objective knows none. log_z_start: the value
    that a learned log Z' was given at step 0, nats; None in all other steps. rollouts: of this replica, alike on all
    its ranks; () from `learn`.
    """

    rows: Tensor
    optimizer_steps: tuple[OptimizerStep, ...]
    lr: float
    alpha: float | None
    log_z_start: float | None = None
    rollouts: tuple[Rollout, ...] = ()

    @property
    def skipped(self) -> bool:
        """Whether an update left the weights as they were.

        That is so where something was not finite, or no rollout was kept.
        """
        return not all(taken.applied for taken in self.optimizer_steps)


def run_step(
    plan: Plan,
    session: Session,
    prompts: Sequence[Prompt],
    step: int,
    *,
    phase: Phase = nullcontext,
    progress: ProgressCallback | None = None,
) -> StepResult:
    """Run one step, from its prompts to its last update. Collective over the run.

    prompts: of the whole step, alike on every rank. step: counted from 0. Raises UserError where saved rollouts are
    damaged or cannot be written, or where the first numbers of this start cannot be trusted.
    """
    first_of_start = step == session.progress.step
    if first_of_start:
        with phase("reference"):
            require_scores_of_base(plan, session, prompts)
    with phase("rollout"):
        rollouts = step_rollouts(plan, session, prompts, sampling_of_step(plan, step), progress)
        give_back(session.groups.device)
        updates = pack_updates(rollouts, plan, session, step)
    inspect = inspection(plan.config, prompts) if first_of_start else None
    return replace(learn(plan, session, updates, step, phase=phase, inspect=inspect), rollouts=tuple(rollouts))


def learn(
    plan: Plan,
    session: Session,
    updates: Sequence[Sequence[MicroBatch]],
    step: int,
    *,
    phase: Phase = nullcontext,
    inspect: Inspect | None = None,
) -> StepResult:
    """Run the rest of a step once its rollouts are there: reference scores and updates. Collective over the run.

    updates: from `pack_updates`, this rank's micro-batches of each update. step: counted from 0. inspect: as `update`
    takes it.
    """
    config, objective = plan.config, objective_of_step(plan.objective, step)
    with phase("reference"):
        scored = [score_reference(session.reference, batches, session.scorer) for batches in updates]
        give_back(session.groups.device)
    log_z_start = None
    if step == 0 and isinstance(objective, BalanceObjective) and objective.learns_log_z:
        log_z_start = calibrate_head(session.trainable, scored, objective, session.scorer)
    with phase("update"):
        lr = set_learning_rates(session.trainable, config.optimizer, step, config.run.num_steps)
        updated = update(
            session.trainable,
            scored,
            session.scorer,
            objective,
            config.optimizer,
            sampled_by=plan.sampled_by,
            inspect=inspect,
        )
        give_back(session.groups.device)
    return StepResult(updated.rows, updated.optimizer_steps, lr, objective.alpha, log_z_start)


def sampling_of_step(plan: Plan, step: int) -> SamplingParams:
    """Return the sampling parameters of a step's rollouts. step: counted from 0."""
    return sampling_params(plan.config, plan.stop_token_ids, step=step)
