"""What does a run consist of on this rank? Policy, reference, head, optimizers, engine, built from a plan.

The order matters: base weights are read first, the reference is made from them, then DDP and the optimizers take the
parameters over, and a checkpoint, if there is one to continue, is loaded last.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_powerflow.checkpoint import storage
from megatron_powerflow.checkpoint.state import Progress, Trainable
from megatron_powerflow.config import ModelSection, PrecisionSection
from megatron_powerflow.conversion.hf_config import Family
from megatron_powerflow.conversion.shards import load_from_hf, open_checked
from megatron_powerflow.data.packing import pack
from megatron_powerflow.model.build import build_chunks, transformer_config
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import token_alignment
from megatron_powerflow.model.reference import Reference, ResidentReference, SwapReference
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.records import Architecture, MicroBatch, Rollout
from megatron_powerflow.rollout.engine import Engine
from megatron_powerflow.rollout.megatron_engine import MegatronEngine
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.optimizer import build_trainable
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.rewards import annotate


@dataclass(frozen=True)
class Session:
    """Everything a step needs, on this rank."""

    groups: Groups
    trainable: Trainable
    reference: Reference
    engine: Engine
    scorer: Scorer
    progress: Progress


def build_policy(
    architecture: Architecture,
    family: Family,
    layout: Layout,
    model: ModelSection,
    precision: PrecisionSection,
    groups: Groups,
) -> list[PolicyModel]:
    """Model chunks of this rank, with the weights of model.hf_path: each rank reads its own slices."""
    config = transformer_config(architecture, layout, model, precision)
    chunks = build_chunks(config, architecture, layout, precision, groups.device)
    load_from_hf(chunks, open_checked(model.hf_path, architecture, family), architecture, family, groups)
    return chunks


def alignment(layout: Layout, precision: PrecisionSection) -> int:
    """Every forward pass has a multiple of this many tokens in a row: sequence parallelism's and FP8's rules."""
    return math.lcm(layout.tp if layout.sequence_parallel else 1, token_alignment(precision))


def build_session(plan: Plan, groups: Groups) -> Session:
    """Collective over all ranks. Loads the checkpoint to continue from, if the plan names one."""
    config, architecture = plan.config, plan.architecture

    def policy() -> list[PolicyModel]:
        return build_policy(architecture, plan.family, plan.layout, config.model, config.precision, groups)

    chunks = policy()
    reference = SwapReference(chunks) if config.model.reference == "swap" else ResidentReference(policy())
    head = None
    if config.objective.learns_log_z and groups.is_last_stage:
        head = LogZHead(
            architecture.hidden_size,
            kind=config.objective.log_z,
            detach=config.objective.log_z_detach is not False,
            seed=config.run.seed,
        ).to(groups.device)
    trainable = build_trainable(chunks, head, config, groups)
    progress = Progress(step=0, position=0, skipped_in_a_row=0, num_skipped=0, wandb_run_id=uuid.uuid4().hex[:12])
    if plan.resume_from is not None:
        progress = storage.load(plan.resume_from, trainable, groups)
    engine = MegatronEngine(
        chunks,
        groups,
        vocab_size=architecture.vocab_size,
        max_concurrent_rows=config.rollout.max_concurrent_rows,
        alignment=alignment(plan.layout, config.precision),
    )
    scorer = Scorer(groups, architecture.vocab_size, config.rollout.temperature, plan.layout.sequence_parallel)
    return Session(groups, trainable, reference, engine, scorer, progress)


def pack_updates(rollouts: Sequence[Rollout], plan: Plan, session: Session) -> list[list[MicroBatch]]:
    """This rank's rollouts as micro-batches, one list per optimizer update; groups stay whole."""
    config = plan.config
    annotated = annotate(rollouts, config.objective, plan.tokenizer, session.groups)
    size = len(annotated) // config.optimizer.updates_per_rollout
    return [
        pack(
            annotated[start : start + size],
            micro_batch_size=config.parallel.micro_batch_size,
            responses_per_prompt=config.rollout.responses_per_prompt,
            drop_truncated=config.objective.truncated == "drop",
            multiple=alignment(plan.layout, config.precision),
            uniform=plan.layout.vpp is not None,
            device=session.groups.device,
        )
        for start in range(0, len(annotated), size)
    ]
