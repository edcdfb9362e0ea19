"""What does a run consist of on this rank? Policy, reference, head, optimizers, engine, built from a plan.

The order matters: base weights are read first, the reference is made from them, then DDP and the optimizers take the
parameters over, and a checkpoint, if there is one to continue, is loaded last.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field, replace

from rich.console import Console

from megatron_powerflow.checkpoint import storage
from megatron_powerflow.checkpoint.state import RunProgress, Trainable
from megatron_powerflow.checkpoint.whole import point_at, whole_checkpoint
from megatron_powerflow.hf.finite import require_finite
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.model.reference import Reference, ResidentReference, SwapReference
from megatron_powerflow.objective.presets import LEARNED_LOG_Z
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import on_main
from megatron_powerflow.records import Rollout
from megatron_powerflow.rollout.engine import Engine
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.known_scores import KnownScores, open_store
from megatron_powerflow.training.optimizer import build_trainable
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.plan_checks import check_replay
from megatron_powerflow.training.policy import build_engine, build_policy, copy_policy


@dataclass(frozen=True)
class Session:
    """Everything a step needs, on this rank."""

    groups: Groups
    trainable: Trainable
    reference: Reference
    engine: Engine
    scorer: Scorer
    progress: RunProgress
    known_scores: KnownScores | None = None  # of model.reference_store
    # of the last rollout.buffer_steps steps, by step: what this replica has scored of them; see rollout_buffer.py
    buffer: dict[int, list[Rollout]] = field(default_factory=dict)


def from_whole_checkpoint(plan: Plan, groups: Groups, console: Console) -> Plan:
    """The plan, with the newest checkpoint before its own where the files of that are damaged. Collective.

    A checkpoint that the config goes back to becomes `latest`: the same command, started again, goes on from there.
    """
    if plan.resume.checkpoint is None:
        return plan
    checkpoint = whole_checkpoint(
        plan.resume.checkpoint,
        groups,
        may_go_back=not plan.resume.goes_back,
        say=console.print if groups.is_main else lambda text: None,
    )
    if plan.resume.goes_back:
        on_main(lambda: point_at(checkpoint), groups)
    if checkpoint == plan.resume.checkpoint:
        return plan
    if (replay := plan.config.rollout.replay) is not None:
        check_replay(plan.config, replay, plan.architecture, checkpoint)
    return replace(plan, resume=replace(plan.resume, checkpoint=checkpoint))


def build_session(plan: Plan, groups: Groups) -> Session:
    """Collective over all ranks. Loads the checkpoint to continue from, if the plan names one."""
    config, architecture = plan.config, plan.architecture
    model = config.model.model_copy(update={"hf_path": str(plan.model_folder)})
    chunks = build_policy(architecture, plan.family, plan.layout, model, config.precision, groups)
    known_scores = open_store(plan, chunks, groups)
    reference: Reference
    if config.model.reference == "swap":
        reference = SwapReference(chunks)
    else:
        reference = ResidentReference(copy_policy(chunks, architecture, plan.layout, model, config.precision, groups))
    head, kind = None, config.objective.log_z
    if kind in LEARNED_LOG_Z and groups.is_last_stage:
        head = LogZHead(
            architecture.hidden_size,
            kind=kind,
            detach=config.objective.log_z_detach is not False,
            seed=config.run.seed,
        ).to(groups.device)
    trainable = build_trainable(chunks, head, config, groups)
    progress = RunProgress(step=0, position=0, skipped_in_a_row=0, num_skipped=0, wandb_run_id=uuid.uuid4().hex[:12])
    if plan.resume_from is not None:
        progress = storage.load(plan.resume_from, trainable, groups)
        require_finite(chunks, plan.family, groups, plan.resume_from)
    engine = build_engine(chunks, architecture, plan.layout, config, groups)
    scorer = Scorer(groups, architecture.vocab_size, config.rollout.temperature, plan.layout.sequence_parallel)
    return Session(groups, trainable, reference, engine, scorer, progress, known_scores)
