"""How likely are rollouts under the frozen base, or, token by token, under the policy?

They may be of any number. This is for looking at a policy, not for training it.

Left out: the forward pass (`score.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_powerflow.config import Config
from megatron_powerflow.data.packing import AnnotatedRollout, pack
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.parallel.batching import padded_rows
from megatron_powerflow.parallel.collectives import last_stage_rows
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.records import MicroBatch, Prompt, Rollout
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.micro_batches import padded_multiple
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.score import score, score_reference, scored_batches
from megatron_powerflow.training.session import Session

FILLER = Rollout(Prompt("", 0, (0,)), -1, 0, (0,), (0.0,), "eos")  # scored and thrown away: replicas have equal shares


def reference_sequence_log_probs(rollouts: Sequence[Rollout], plan: Plan, session: Session) -> np.ndarray:
    """Return the log-prob of each response under the base model: [B] fp64, nats, on every rank.

    It is the sum over the response's tokens, at rollout.temperature. rollouts: all of them, alike on every rank.
    Collective over the run.
    """
    groups = session.groups
    batches, share = _packed(rollouts, plan.config, plan.layout, groups)
    scored = score_reference(session.reference, batches, session.scorer)
    rows = None
    if groups.is_last_stage:
        sums = [
            torch.stack([batch.rollout_index.double(), batch.ref_log_probs.double().sum(dim=1)], dim=1)
            for batch in scored_batches(scored)
        ]
        rows = torch.cat(sums).cpu()
    table = last_stage_rows(rows, share, 2, groups).numpy()
    return table[table[:, 0].argsort(), 1][: len(rollouts)]


def policy_token_log_probs(
    rollouts: Sequence[Rollout],
    config: Config,
    layout: Layout,
    groups: Groups,
    chunks: Sequence[PolicyModel],
    scorer: Scorer,
) -> tuple[tuple[float, ...], ...]:
    """Return the log-prob of each token of each response under the policy, nats, on every rank.

    chunks: the policy's. rollouts: all of them, alike on every rank. Collective over the run.
    """
    batches, share = _packed(rollouts, config, layout, groups)
    training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    scored = score(chunks, batches, scorer)
    for chunk, was_training in zip(chunks, training, strict=True):
        chunk.train(was_training)
    longest = max(len(rollout.response_token_ids) for rollout in rollouts)
    rows = None
    if groups.is_last_stage:
        rows = torch.full((share, 1 + longest), torch.nan, dtype=torch.float64)
        place = 0
        for batch, values in zip(batches, scored, strict=True):
            assert values is not None, "on the last stage"
            for index, mask, own in zip(batch.rollout_index, batch.loss_mask, values, strict=True):
                chosen = own[mask].double().cpu()
                rows[place, 0] = float(index)
                rows[place, 1 : 1 + len(chosen)] = chosen[:longest]
                place += 1
    table = last_stage_rows(rows, share, 1 + longest, groups).numpy()
    table = table[table[:, 0].argsort(), 1:][: len(rollouts)]
    return tuple(
        tuple(row[: len(rollout.response_token_ids)].tolist()) for row, rollout in zip(table, rollouts, strict=True)
    )


def _packed(
    rollouts: Sequence[Rollout], config: Config, layout: Layout, groups: Groups
) -> tuple[list[MicroBatch], int]:
    """Return this rank's share of any number of rollouts as micro-batches, each a group of its own by its place, and
    how many rollouts the share has, fillers among them."""
    size = padded_rows(config, layout)
    unit = size * (layout.pp if layout.vpp else 1)  # interleaved stages take turns of pp micro-batches
    share = -(-len(rollouts) // (groups.dp_size * unit)) * unit
    filled = [*rollouts, *[FILLER] * (share * groups.dp_size - len(rollouts))]
    numbered = [replace(rollout, slot=number, response_index=0) for number, rollout in enumerate(filled)]
    batches = pack(
        [AnnotatedRollout(rollout) for rollout in numbered[groups.dp_rank * share : (groups.dp_rank + 1) * share]],
        micro_batch_size=size,
        responses_per_prompt=1,
        drop_truncated=False,
        multiple=padded_multiple(layout, config.precision, groups.device),
        uniform=layout.vpp is not None,
        device=groups.device,
        cp_rank=groups.cp_rank,
        cp_size=groups.cp_size,
    )
    return batches, share
