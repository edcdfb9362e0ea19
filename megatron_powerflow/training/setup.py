"""What does a run consist of on this rank? Policy, reference, head, optimizers, engine, built from a plan.

The order matters: base weights are read first, the reference is made from them, then DDP and the optimizers take the
parameters over, and a checkpoint, if there is one to continue, is loaded last.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_powerflow.checkpoint import storage
from megatron_powerflow.checkpoint.folder import is_converted
from megatron_powerflow.checkpoint.state import Progress, Trainable
from megatron_powerflow.config import Config, ModelSection, PrecisionSection
from megatron_powerflow.conversion.checked import open_checked
from megatron_powerflow.conversion.hf_config import Family
from megatron_powerflow.conversion.shards import load_from_hf
from megatron_powerflow.data.bins import BinRule, flop_count, groups_fit, plan_update
from megatron_powerflow.data.packing import Annotated, pack, pack_streams
from megatron_powerflow.model.build import build_chunks, transformer_config
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import token_alignment
from megatron_powerflow.model.reference import Reference, ResidentReference, SwapReference
from megatron_powerflow.parallel.collectives import every_rollout
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.presets import Balance
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
    start = Path(model.hf_path)
    if is_converted(start):
        storage.load_weights(start, chunks, groups)
    else:
        load_from_hf(chunks, open_checked(start, architecture, family), architecture, family, groups)
    return chunks


def alignment(layout: Layout, precision: PrecisionSection) -> int:
    """A rank's forward pass has a multiple of this many tokens in a row: sequence parallelism's and FP8's rules."""
    return math.lcm(layout.tp if layout.sequence_parallel else 1, token_alignment(precision))


def bin_rule(layout: Layout, config: Config) -> BinRule:
    """What packed micro-batches must be like."""
    return BinRule(
        max_tokens=config.parallel.max_tokens_per_micro_batch,
        sequence_multiple=layout.sequence_multiple,
        total_multiple=layout.position_multiple(token_alignment(config.precision)),
        count_multiple=layout.pp if layout.vpp else 1,
    )


def build_session(plan: Plan, groups: Groups) -> Session:
    """Collective over all ranks. Loads the checkpoint to continue from, if the plan names one."""
    config, architecture = plan.config, plan.architecture
    model = config.model.model_copy(update={"hf_path": str(plan.model_folder)})

    def policy() -> list[PolicyModel]:
        return build_policy(architecture, plan.family, plan.layout, model, config.precision, groups)

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
    """The step's rollouts as micro-batches of this rank, one list per optimizer update; groups stay whole.

    rollouts: this replica's share; packed, groups change replicas for the sake of balance. Collective.
    """
    config, groups = plan.config, session.groups
    arguments = {
        "responses_per_prompt": config.rollout.responses_per_prompt,
        "drop_truncated": config.objective.truncated == "drop",
        "uniform": plan.layout.vpp is not None,
        "device": groups.device,
        "cp_rank": groups.cp_rank,
        "cp_size": groups.cp_size,
    }
    if config.parallel.max_tokens_per_micro_batch is not None:
        return _pack_streams(rollouts, plan, groups, arguments)
    annotated = annotate(rollouts, config.objective, plan.tokenizer)
    size = len(annotated) // config.optimizer.updates_per_rollout
    return [
        pack(
            annotated[start : start + size],
            micro_batch_size=config.parallel.micro_batch_size,
            multiple=plan.layout.position_multiple(token_alignment(config.precision)),
            **arguments,
        )
        for start in range(0, len(annotated), size)
    ]


def _pack_streams(
    rollouts: Sequence[Rollout], plan: Plan, groups: Groups, arguments: dict[str, Any]
) -> list[list[MicroBatch]]:
    """Every rank sees the lengths of all rollouts, makes the plan of all ranks, and takes its own part."""
    config = plan.config
    rule, flops = bin_rule(plan.layout, config), flop_count(plan.architecture)
    # annotated where they were sampled, in whole groups: a rank's own part may hold a piece of a group only
    everyone = annotate(rollouts, config.objective, plan.tokenizer)
    if groups.dp_size > 1:
        everyone = every_rollout(everyone, groups, shared_over_cp=False)
    annotated = {_name(item): item for item in everyone}
    by_group = [[item.rollout for item in members] for _, members in groupby(everyone, key=lambda item: item.slot)]
    per_update = len(by_group) // config.optimizer.updates_per_rollout
    estimates = isinstance(config.objective.form, Balance) and not config.objective.learns_log_z
    planned = []  # of each update: this rank's micro-batches of rollouts, and whether groups are whole in them
    for first in range(0, len(by_group), per_update):
        members = by_group[first : first + per_update]
        lengths = [[len(r.prompt.token_ids) + len(r.response_token_ids) for r in group] for group in members]
        together = estimates and groups_fit(lengths, rule)
        bins = plan_update(lengths, groups.dp_size, rule, flops, together=together)[groups.dp_rank]
        planned.append(([[members[q][i] for q, i in bin] for bin in bins], together))
    return [
        pack_streams(
            [[annotated[_name(rollout)] for rollout in bin] for bin in bins], rule, whole_groups=together, **arguments
        )
        for bins, together in planned
    ]


def _name(rollout: Rollout | Annotated) -> tuple[int, int]:
    return rollout.slot, rollout.response_index
