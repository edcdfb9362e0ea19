"""How likely are rollouts under the frozen base?

They may be of any number. This is for looking at a policy, not for training it.

Left out: the forward pass (`score.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_powerflow.data.packing import AnnotatedRollout, pack
from megatron_powerflow.parallel.batching import padded_rows
from megatron_powerflow.parallel.collectives import last_stage_rows
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.training.micro_batches import padded_multiple
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.score import score_reference, scored_batches
from megatron_powerflow.training.session import Session

FILLER = Rollout(Prompt("", 0, (0,)), -1, 0, (0,), (0.0,), "eos")  # scored and thrown away: replicas have equal shares


def reference_sequence_log_probs(rollouts: Sequence[Rollout], plan: Plan, session: Session) -> np.ndarray:
    """Return the log-prob of each response under the base model: [B] fp64, nats, on every rank.

    It is the sum over the response's tokens, at rollout.temperature. rollouts: all of them, alike on every rank.
    Collective over the run.
    """
    groups, config = session.groups, plan.config
    size = padded_rows(config, plan.layout)
    unit = size * (plan.layout.pp if plan.layout.vpp else 1)  # interleaved stages take turns of pp micro-batches
    share = -(-len(rollouts) // (groups.dp_size * unit)) * unit
    filled = [*rollouts, *[FILLER] * (share * groups.dp_size - len(rollouts))]
    numbered = [replace(rollout, slot=number, response_index=0) for number, rollout in enumerate(filled)]
    batches = pack(
        [AnnotatedRollout(rollout) for rollout in numbered[groups.dp_rank * share : (groups.dp_rank + 1) * share]],
        micro_batch_size=size,
        responses_per_prompt=1,
        drop_truncated=False,
        multiple=padded_multiple(plan.layout, config.precision, groups.device),
        uniform=plan.layout.vpp is not None,
        device=groups.device,
        cp_rank=groups.cp_rank,
        cp_size=groups.cp_size,
    )
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
