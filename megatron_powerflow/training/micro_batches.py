"""How do a step's rollouts become micro-batches? One list of them per optimizer update; groups stay whole.

Left out: the rows and streams themselves (`data/packing.py`), which rollout goes into which bin (`data/bins.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TypedDict

import torch

from megatron_powerflow.config import Config, PrecisionSection
from megatron_powerflow.data.bins import BinRule, flop_count, groups_fit, plan_update
from megatron_powerflow.data.packing import AnnotatedRollout, pack, pack_streams
from megatron_powerflow.model.length_step import length_step
from megatron_powerflow.objective.presets import Balance
from megatron_powerflow.parallel.batching import fewest_micro_batches, token_budget
from megatron_powerflow.parallel.collectives import every_row
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.records import MicroBatch, Rollout
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.rewards import annotate
from megatron_powerflow.training.rollout_exchange import to_replicas
from megatron_powerflow.training.session import Session
from megatron_powerflow.training.staleness import lag_of


def bin_rule(layout: Layout, config: Config) -> BinRule:
    """Return the sizes that packed micro-batches may have, under this layout and config."""
    budget = token_budget(config, layout)
    assert budget is not None, "where micro_batch_size pads"
    return BinRule(
        max_tokens=budget,
        sequence_multiple=layout.sequence_multiple,
        total_multiple=layout.position_multiple(config.precision),
        count_multiple=layout.pp if layout.vpp else 1,
        fewest=fewest_micro_batches(config, layout),
    )


def padded_multiple(layout: Layout, precision: PrecisionSection, device: torch.device) -> int:
    """Return the multiple to which padded micro-batches are padded, in positions of all cp ranks together.

    It is what layout and FP8 need, and on CUDA one of few lengths: see `model/length_step.py`.
    """
    return math.lcm(layout.position_multiple(precision), length_step(device))


class Packing(TypedDict):
    """The arguments that `pack` and `pack_streams` have in common."""

    responses_per_prompt: int
    drop_truncated: bool
    uniform: bool
    device: torch.device
    cp_rank: int
    cp_size: int


def pack_updates(rollouts: Sequence[Rollout], plan: Plan, session: Session, step: int) -> list[list[MicroBatch]]:
    """Return the step's rollouts as micro-batches of this rank, one list per optimizer update.

    Groups stay whole within an update. rollouts: this replica's share; packed, groups change replicas for the sake of
    balance. step: the one that trains on them, counted from 0. Collective over the run.
    """
    config, groups = plan.config, session.groups
    arguments: Packing = {
        "responses_per_prompt": config.rollout.responses_per_prompt,
        "drop_truncated": config.objective.truncated == "drop",
        "uniform": plan.layout.vpp is not None,
        "device": groups.device,
        "cp_rank": groups.cp_rank,
        "cp_size": groups.cp_size,
    }
    if config.parallel.micro_batch_size is None:
        return _pack_streams(rollouts, plan, groups, arguments, step)
    annotated = _annotated(rollouts, plan, step)
    size = len(annotated) // config.optimizer.updates_per_rollout
    return [
        pack(
            annotated[start : start + size],
            micro_batch_size=config.parallel.micro_batch_size,
            multiple=padded_multiple(plan.layout, config.precision, groups.device),
            **arguments,
        )
        for start in range(0, len(annotated), size)
    ]


def _pack_streams(
    rollouts: Sequence[Rollout], plan: Plan, groups: Groups, arguments: Packing, step: int
) -> list[list[MicroBatch]]:
    """Plan the packed micro-batches of all ranks by the lengths of all rollouts, and pack those of this rank."""
    config = plan.config
    rule, flops = bin_rule(plan.layout, config), flop_count(plan.architecture)
    lengths = _every_length(rollouts, groups)
    per_update = len(lengths) // config.optimizer.updates_per_rollout
    estimates = isinstance(config.objective.form, Balance) and not config.objective.learns_log_z
    planned = []  # of each update: this rank's micro-batches as (slot, response) pairs, and whether groups are whole
    replica_of: dict[int, int] = {}  # slot -> the data-parallel rank that trains on the whole group
    for first in range(0, len(lengths), per_update):
        of_update = lengths[first : first + per_update]
        together = estimates and groups_fit(of_update, rule)
        shares = plan_update(of_update, groups.dp_size, rule, flops, together=together)
        planned.append(([[(first + q, i) for q, i in bin] for bin in shares[groups.dp_rank]], together))
        replica_of |= {first + q: rank for rank, bins in enumerate(shares) for bin in bins for q, _ in bin}
    parts: list[list[Rollout]] = [[] for _ in range(groups.dp_size)]
    for rollout in rollouts:
        parts[replica_of[rollout.slot]].append(rollout)
    mine = _annotated(to_replicas(parts, groups), plan, step)
    annotated = {(item.slot, item.response_index): item for item in mine}
    return [
        pack_streams([[annotated[name] for name in bin] for bin in bins], rule, whole_groups=together, **arguments)
        for bins, together in planned
    ]


def _annotated(rollouts: Sequence[Rollout], plan: Plan, step: int) -> list[AnnotatedRollout]:
    """Return the rollouts with what follows from their text, and the lag of the weights that wrote them."""
    annotated = annotate(rollouts, plan.config.objective, plan.tokenizer)
    return [replace(item, lag=lag_of(item.rollout, step, plan.sampled_by)) for item in annotated]


def _every_length(rollouts: Sequence[Rollout], groups: Groups) -> list[list[int]]:
    """Return the length in tokens of prompt and response, of each response of each slot, on every rank.

    rollouts: this replica's share, by slot, then response. Collective over the run.
    """
    members = [list(group) for _, group in groupby(rollouts, key=lambda rollout: rollout.slot)]
    lengths = [[len(r.prompt.token_ids) + len(r.response_token_ids) for r in group] for group in members]
    if groups.dp_size == 1:
        return lengths
    slots = torch.tensor([group[0].slot for group in members])
    return every_row(torch.tensor(lengths), slots, groups).tolist()
