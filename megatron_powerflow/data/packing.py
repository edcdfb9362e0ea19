"""How do rollouts become micro-batches? Sorted by length, cut into equal counts, padded to the longest.

Left out: token budgets and packed sequences; the reference's and the policy's log-probs, which scoring adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_powerflow.records import ANNOTATION_COLUMNS, MicroBatch, Rollout


@dataclass(frozen=True, slots=True)
class Annotated:
    """A rollout and what its text says: psi <= 0, the format penalty; its reward; numbers for the metrics."""

    rollout: Rollout
    psi: float = 0.0
    reward: float = 0.0
    annotations: tuple[float, ...] = (math.nan,) * len(ANNOTATION_COLUMNS)

    @property
    def num_tokens(self) -> int:
        return len(self.rollout.prompt.token_ids) + len(self.rollout.response_token_ids)


def pack(
    annotated: Sequence[Annotated],
    *,
    micro_batch_size: int,
    responses_per_prompt: int,
    drop_truncated: bool,
    multiple: int,
    uniform: bool,
    device: torch.device,
) -> list[MicroBatch]:
    """Micro-batches of `micro_batch_size` rollouts (the last may be smaller), long ones first.

    multiple: positions of each micro-batch are padded to a multiple of this (tp with sequence parallelism, FP8).
    uniform: all are as long as the longest (interleaved pipelines). The order is a function of the rollouts alone.
    """
    ordered = sorted(annotated, key=lambda a: (-a.num_tokens, a.rollout.slot, a.rollout.response_index))
    parts = [ordered[start : start + micro_batch_size] for start in range(0, len(ordered), micro_batch_size)]
    longest = [max(item.num_tokens for item in (ordered if uniform else part)) for part in parts]
    return [
        _micro_batch(part, -(-length // multiple) * multiple, responses_per_prompt, drop_truncated, device)
        for part, length in zip(parts, longest, strict=True)
    ]


def _micro_batch(
    annotated: Sequence[Annotated],
    positions: int,
    responses_per_prompt: int,
    drop_truncated: bool,
    device: torch.device,
) -> MicroBatch:
    size = len(annotated)
    tokens = torch.zeros(size, positions, dtype=torch.int64)
    targets = torch.zeros(size, positions, dtype=torch.int64)
    loss_mask = torch.zeros(size, positions, dtype=torch.bool)
    prompt_mask = torch.zeros(size, positions, dtype=torch.bool)
    rollout_log_probs = torch.zeros(size, positions, dtype=torch.float32)
    rollouts = [item.rollout for item in annotated]
    for row, rollout in enumerate(rollouts):
        prompt, response = rollout.prompt.token_ids, rollout.response_token_ids
        whole = torch.tensor(prompt + response)
        tokens[row, : len(whole)] = whole
        targets[row, : len(whole) - 1] = whole[1:]
        prompt_mask[row, : len(prompt)] = True
        # position t predicts token t + 1: the first response token is predicted at the last prompt token
        answer = slice(len(prompt) - 1, len(whole) - 1)
        loss_mask[row, answer] = True
        rollout_log_probs[row, answer] = torch.tensor(rollout.rollout_log_probs)
    truncated = torch.tensor([rollout.finish_reason == "length" for rollout in rollouts])
    batch = {
        "tokens": tokens,
        "targets": targets,
        "loss_mask": loss_mask,
        "prompt_mask": prompt_mask,
        "num_response_tokens": loss_mask.sum(dim=1),
        "rollout_log_probs": rollout_log_probs,
        "rollout_index": torch.tensor([r.slot * responses_per_prompt + r.response_index for r in rollouts]),
        "group": torch.tensor([rollout.slot for rollout in rollouts]),
        "psi": torch.tensor([item.psi for item in annotated], dtype=torch.float32),
        "reward": torch.tensor([item.reward for item in annotated], dtype=torch.float32),
        "truncated": truncated,
        "kept": ~truncated if drop_truncated else torch.ones_like(truncated),
        "annotations": torch.tensor([item.annotations for item in annotated], dtype=torch.float32),
    }
    return MicroBatch(**{name: tensor.to(device) for name, tensor in batch.items()})
