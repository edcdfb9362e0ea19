"""Micro-batches with numbers that can be worked by hand: what a loss compares, without a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_powerflow.data.packing import chosen_tokens
from megatron_powerflow.records import ANNOTATION_COLUMNS, ScoredBatch, extended

NUM_PROMPT_TOKENS = 2
Responses = Sequence[Sequence[float]]


def rows(responses: Responses) -> Tensor:
    """[b, s] fp64: a number for each token of each response, where MicroBatch has it; 0 on prompts and padding."""
    found = torch.zeros(len(responses), NUM_PROMPT_TOKENS + max(map(len, responses)), dtype=torch.float64)
    for row, numbers in enumerate(responses):
        found[row, NUM_PROMPT_TOKENS - 1 : NUM_PROMPT_TOKENS - 1 + len(numbers)] = torch.tensor(numbers).double()
    return found


def scored_batch(ref: Responses, *, kind=ScoredBatch, **fields):
    """Responses as long as their log-probs by the reference; one group, all kept, no psi and no reward unless `fields`
    says otherwise, by lists or tensors. Tokens of a response: 10, 11, ..., those of a prompt: 7, 8."""
    size, lengths = len(ref), torch.tensor([len(numbers) for numbers in ref])
    ref_log_probs = rows(ref)
    places = torch.arange(ref_log_probs.shape[1])
    first, last = NUM_PROMPT_TOKENS, NUM_PROMPT_TOKENS + lengths[:, None]
    tokens = torch.where(places < first, places + 7, torch.where(places < last, places - first + 10, 0))
    values = {
        "tokens": tokens,
        "targets": torch.cat([tokens[:, 1:], torch.zeros(size, 1, dtype=torch.int64)], dim=1),
        "loss_mask": (places >= first - 1) & (places < last - 1),
        "prompt_mask": (places < first).expand(size, -1),
        "num_response_tokens": lengths,
        "rollout_log_probs": torch.zeros_like(ref_log_probs),
        "rollout_index": torch.arange(size),
        "group": torch.zeros(size, dtype=torch.int64),
        "psi": torch.zeros(size, dtype=torch.float64),
        "reward": torch.zeros(size, dtype=torch.float64),
        "truncated": torch.zeros(size, dtype=torch.bool),
        "kept": torch.ones(size, dtype=torch.bool),
        "responses": chosen_tokens((places >= first - 1) & (places < last - 1), None),
        "prompts": chosen_tokens((places < first).expand(size, -1), None),
        "annotations": torch.full((size, len(ANNOTATION_COLUMNS)), torch.nan),
        "lag": torch.tensor([[0.0, 0.0, 1.0]] * size),
        "ref_log_probs": ref_log_probs,
    }
    given = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in fields.items()}
    given = {name: value.double() if _is_fp32(value) else value for name, value in given.items()}
    return kind(**values | given)


def changed(batch: ScoredBatch, **fields):
    """The same but for `fields`."""
    return dataclasses.replace(batch, **fields)


def as_kind(batch: ScoredBatch, kind, **late):
    return extended(batch, kind, **late)


def _is_fp32(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32
