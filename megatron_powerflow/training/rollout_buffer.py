"""Which rollouts does a step train on beside its own? Those of the last `rollout.buffer_steps` steps, in whole groups.

    step 7, buffer_steps 2    its own 32 groups, and the 32 each of steps 6 and 5; step 0 has its own alone

    slot of a group           place among its step's prompts * number of steps + age: 0 for the step's own

So no two groups have one slot, each update of a step takes equally many groups of every age, and each replica trains on
equally many. The reference scores a step's rollouts once, in the micro-batches that the step alone would have had, and
its numbers stay with them in memory. A run that goes on reads the rollouts from RUN/rollouts, and scores them in those
micro-batches again, or finds them in `model.reference_store`: the numbers are the same bits.

The older rollouts are of earlier policies. Where residuals are zero they are so for any response, so that a trajectory
balance ends where it would without them; S_old of the importance weight is the policy at the start of the step.

Left out: what old rollouts weigh; saved rollouts themselves (`rollout/rollout_files.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_powerflow.records import ROLLOUT_COLUMNS, MicroBatch, Rollout, ScoredBatch, extended
from megatron_powerflow.training.known_scores import ReferenceCount, score_updates
from megatron_powerflow.training.micro_batches import pack_rollouts
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.score import scored_batches
from megatron_powerflow.training.session import Session
from megatron_powerflow.training.step_rollouts import saved_rollouts

Updates = list[list[MicroBatch]]


def scored_with_buffer(
    plan: Plan, session: Session, rollouts: Sequence[Rollout], step: int
) -> tuple[Updates, ReferenceCount]:
    """Return the micro-batches of each update, of the step's rollouts and those of the steps before, scored.

    rollouts: this replica's share of the step's. Afterwards `session.buffer` holds what the next step takes. The count
    is of the passes that were made for the step; at a start, those for the steps before it, too. Collective over the
    run. Raises UserError where a file of rollouts cannot be read.
    """
    buffer, first = session.buffer, max(0, step - plan.config.rollout.buffer_steps)
    counts = []
    for earlier in range(first, step):
        if earlier not in buffer:
            buffer[earlier], count = _scored(plan, session, saved_rollouts(plan, session.groups, earlier), earlier)
            counts.append(count)
    buffer[step], count = _scored(plan, session, rollouts, step)
    for old in [number for number in buffer if not first <= number <= step]:
        del buffer[old]
    updates, held = pack_rollouts(_renumbered(buffer, step), plan, session, step)
    passes = sum(one.passes for one in (*counts, count))
    return [_with_scores(batches, held, plan, session) for batches in updates], replace(count, passes=passes)


def num_steps_trained(plan: Plan, step: int) -> int:
    """Return of how many steps the rollouts are that a step trains on, its own included."""
    return min(plan.config.rollout.buffer_steps, step) + 1


def own_rows(rows: Tensor, num_steps: int, responses_per_prompt: int) -> Tensor:
    """Return the rows of a step's own rollouts, with their rollout_index in the step; the others are left out.

    rows: [n, len(ROLLOUT_COLUMNS)] fp64, of the rollouts of `num_steps` steps.
    """
    column = ROLLOUT_COLUMNS.index("rollout_index")
    slot, response = rows[:, column] // responses_per_prompt, rows[:, column] % responses_per_prompt
    kept = slot % num_steps == 0
    own = rows[kept].clone()
    own[:, column] = slot[kept] // num_steps * responses_per_prompt + response[kept]
    return own


def _scored(
    plan: Plan, session: Session, rollouts: Sequence[Rollout], step: int
) -> tuple[list[Rollout], ReferenceCount]:
    """Return the rollouts of a step that this replica has scored, whole groups by slot, with the reference's log-probs
    on the last stage. rollouts: its share of the step's. Collective over the run."""
    updates, held = pack_rollouts(rollouts, plan, session, step)
    scored, count = score_updates(session.reference, updates, session.scorer, session.known_scores)
    if not session.groups.is_last_stage:
        return held, count
    values = {
        int(index): tuple(row[mask].tolist())
        for batches in scored
        for batch in scored_batches(batches)
        for index, row, mask in zip(batch.rollout_index, batch.ref_log_probs.cpu(), batch.loss_mask.cpu(), strict=True)
    }
    return [replace(rollout, ref_log_probs=values[_index(rollout, plan)]) for rollout in held], count


def _renumbered(buffer: dict[int, list[Rollout]], step: int) -> list[Rollout]:
    """Return the rollouts of all steps, by slot as this file's beginning has it, then response; the older ones say by
    which weights they are."""
    every = [
        replace(
            rollout,
            slot=rollout.slot * len(buffer) + step - number,
            weight_versions=rollout.weight_versions or _of_step(rollout, number, step),
        )
        for number, rollouts in buffer.items()
        for rollout in rollouts
    ]
    return sorted(every, key=lambda rollout: (rollout.slot, rollout.response_index))


def _of_step(rollout: Rollout, number: int, step: int) -> tuple[tuple[int, int, int], ...]:
    return () if number == step else ((number, 0, len(rollout.response_token_ids)),)


def _with_scores(
    batches: Sequence[MicroBatch], held: Sequence[Rollout], plan: Plan, session: Session
) -> list[MicroBatch]:
    """Return the micro-batches with the log-probs that their rollouts came with, on the last stage."""
    if not session.groups.is_last_stage:
        return list(batches)
    values = {_index(rollout, plan): rollout.ref_log_probs for rollout in held}
    scored: list[MicroBatch] = []
    for batch in batches:
        log_probs = torch.zeros(batch.tokens.shape, dtype=torch.float32)
        for row, mask, index in zip(log_probs, batch.loss_mask.cpu(), batch.rollout_index.tolist(), strict=True):
            row[mask] = torch.tensor(values[index])
        scored.append(extended(batch, ScoredBatch, ref_log_probs=log_probs.to(batch.tokens.device)))
    return scored


def _index(rollout: Rollout, plan: Plan) -> int:
    return rollout.slot * plan.config.rollout.responses_per_prompt + rollout.response_index
