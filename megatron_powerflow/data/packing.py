"""How do rollouts become micro-batches? Padded: sorted by length, cut into equal counts. Packed: as `bins.py` planned.

Either way a `MicroBatch` consists of rows. A `Stream` says how the rows' tokens go through the model when they are
packed, or split over context-parallel ranks.

Left out: the plan itself; the reference's and the policy's log-probs, which scoring adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from megatron_powerflow.data.bins import BinRule
from megatron_powerflow.former_names import former_names_of
from megatron_powerflow.records import (
    ANNOTATION_COLUMNS,
    LAG_COLUMNS,
    ChosenTokens,
    MicroBatch,
    Piece,
    Rollout,
    Stream,
)

if not TYPE_CHECKING:  # names of 0.1.0, until 0.3
    __getattr__ = former_names_of(__name__)

Record = TypeVar("Record")
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class AnnotatedRollout:
    """Joins a rollout and the numbers that follow from its text.

    psi: the format penalty, <= 0. reward: the task's. annotations: ANNOTATION_COLUMNS, for the metrics; NaN: unknown.
    lag: LAG_COLUMNS, by default of the weights that train.
    """

    rollout: Rollout
    psi: float = 0.0
    reward: float = 0.0
    annotations: tuple[float, ...] = (math.nan,) * len(ANNOTATION_COLUMNS)
    lag: tuple[float, ...] = (0.0, 0.0, 1.0)

    @property
    def slot(self) -> int:
        """Returns the slot of the rollout's group."""
        return self.rollout.slot

    @property
    def response_index(self) -> int:
        """Returns the index of the response in its group."""
        return self.rollout.response_index

    @property
    def num_tokens(self) -> int:
        """Returns the length of prompt and response together."""
        return len(self.rollout.prompt.token_ids) + len(self.rollout.response_token_ids)


def pack(
    annotated: Sequence[AnnotatedRollout],
    *,
    micro_batch_size: int,
    responses_per_prompt: int,
    drop_truncated: bool,
    multiple: int,
    uniform: bool,
    device: torch.device,
    cp_rank: int = 0,
    cp_size: int = 1,
) -> list[MicroBatch]:
    """Makes padded micro-batches of `micro_batch_size` rollouts (the last may be smaller), long ones first.

    multiple: positions of each micro-batch are padded to a multiple of this (2 cp; tp with sequence parallelism; FP8).
    uniform: all are as long as the longest (interleaved pipelines). The order is a function of the rollouts alone.
    """
    ordered = sorted(annotated, key=lambda a: (-a.num_tokens, a.rollout.slot, a.rollout.response_index))
    parts = [ordered[start : start + micro_batch_size] for start in range(0, len(ordered), micro_batch_size)]
    longest = [max(item.num_tokens for item in (ordered if uniform else part)) for part in parts]
    batches = []
    for part, length in zip(parts, longest, strict=True):
        positions = -(-length // multiple) * multiple
        stream = row_stream(len(part), positions, cp_rank, cp_size, CPU) if cp_size > 1 else None
        batch = _micro_batch(part, positions, responses_per_prompt, drop_truncated, stream)
        batches.append(_on(device, batch))
    return batches


def pack_streams(
    bins: Sequence[Sequence[AnnotatedRollout]],
    rule: BinRule,
    *,
    responses_per_prompt: int,
    drop_truncated: bool,
    uniform: bool,
    device: torch.device,
    cp_rank: int = 0,
    cp_size: int = 1,
    whole_groups: bool = False,
) -> list[MicroBatch]:
    """Makes a packed micro-batch of each element of `bins` (see `plan_update`), its sequences one behind the other.

    An empty element gives a dummy. uniform: all streams are as long as the longest (interleaved pipelines).
    """

    def rounded(num_tokens: int) -> int:
        return max(-(-num_tokens // rule.total_multiple), 1) * rule.total_multiple

    totals = [rounded(sum(rule.padded(item.num_tokens) for item in bin)) for bin in bins]
    batches = []
    for bin, total in zip(bins, totals, strict=True):
        ordered = sorted(bin, key=lambda a: (-a.num_tokens, a.rollout.slot, a.rollout.response_index))
        longest = max((item.num_tokens for item in ordered), default=1)
        lengths = [item.num_tokens for item in ordered]
        total = max(totals) if uniform else total
        stream = packed_stream(lengths, longest, total, rule.sequence_multiple, cp_rank, cp_size, CPU)
        batch = _micro_batch(ordered, longest, responses_per_prompt, drop_truncated, stream)
        batches.append(_on(device, replace(batch, whole_groups=whole_groups)))
    return batches


def row_stream(num_rows: int, positions: int, cp_rank: int, cp_size: int, device: torch.device) -> Stream:
    """Returns this context-parallel rank's part of each of `num_rows` padded rows; 2 cp divides `positions`."""
    held = _positions_of_rank(positions, cp_rank, cp_size)
    return Stream(
        index=(held + positions * torch.arange(num_rows)[:, None]).to(device),
        positions=held.to(device),
        pieces=tuple(_pieces([positions], cp_rank, cp_size)),
        key_order=_key_order([positions], cp_size).to(device),
        cu_seqlens=None,
        num_positions=positions,
        longest=positions,
    )


def packed_stream(
    lengths: Sequence[int], row: int, total: int, multiple: int, cp_rank: int, cp_size: int, device: torch.device
) -> Stream:
    """Returns the stream of `total` positions that holds sequences of these lengths, each padded to `multiple`.

    row: the length in tokens of the micro-batch's rows, which hold the sequences. Positions that are left over become a
    sequence of padding at the end.
    """
    padded = [-(-length // multiple) * multiple for length in lengths]
    if total > sum(padded):
        padded.append(total - sum(padded))
    held, index = [], []
    for number, size in enumerate(padded):
        length = lengths[number] if number < len(lengths) else 0
        held.append(_positions_of_rank(size, cp_rank, cp_size))
        index.append(torch.where(held[-1] < length, held[-1] + number * row, -1))
    return Stream(
        index=torch.cat(index)[None].to(device),
        positions=torch.cat(held).to(device),
        pieces=tuple(_pieces(padded, cp_rank, cp_size)),
        key_order=_key_order(padded, cp_size).to(device) if cp_size > 1 else None,
        cu_seqlens=torch.tensor([0, *padded]).cumsum(0).to(device, torch.int32),
        num_positions=total,
        longest=max(padded),
    )


def chosen_tokens(mask: Tensor, stream: Stream | None) -> ChosenTokens:
    """Finds the tokens of this rank that a mask [b, s] bool marks; stream: that of its micro-batch."""
    if stream is None:
        row, position = mask.nonzero().unbind(1)
        return ChosenTokens(position * mask.shape[0] + row, row * mask.shape[1] + position)
    index = stream.index
    in_stream = torch.zeros_like(index, dtype=torch.bool)
    if mask.numel():
        in_stream = (index >= 0) & mask.flatten()[index.clamp(min=0)]
    row, position = in_stream.nonzero().unbind(1)
    return ChosenTokens(position * index.shape[0] + row, index[in_stream])


def _on(device: torch.device, record: Record) -> Record:
    """Returns a record of tensors, or of such records, on a device."""
    moved = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            moved[field.name] = value.to(device)
        elif is_dataclass(value):
            moved[field.name] = _on(device, value)  # type: ignore[assignment]
    return replace(record, **moved)  # type: ignore[type-var]


def _positions_of_rank(size: int, cp_rank: int, cp_size: int) -> Tensor:
    """Returns [size / cp] the positions of a sequence on a rank: pieces cp_rank and 2 cp - 1 - cp_rank of 2 cp."""
    if cp_size == 1:
        return torch.arange(size)
    pieces = torch.arange(size).reshape(2 * cp_size, -1)
    return torch.cat([pieces[cp_rank], pieces[2 * cp_size - 1 - cp_rank]])


def _pieces(sizes: Sequence[int], cp_rank: int, cp_size: int) -> list[Piece]:
    """Returns `Stream.pieces` for sequences of these sizes, one behind the other."""
    pieces, first_query, first_key = [], 0, 0
    for size in sizes:
        length = size if cp_size == 1 else size // (2 * cp_size)
        for piece in (0,) if cp_size == 1 else (cp_rank, 2 * cp_size - 1 - cp_rank):
            pieces.append(Piece(first_query, first_query + length, first_key, first_key + (piece + 1) * length))
            first_query += length
        first_key += size
    return pieces


def _key_order(sizes: Sequence[int], cp_size: int) -> Tensor:
    """Returns [t] the index of each position of the stream in the ranks' parts, rank 0's first, concatenated."""
    starts = torch.tensor([0, *sizes]).cumsum(0)
    held = [
        start + _positions_of_rank(size, rank, cp_size)
        for rank in range(cp_size)
        for start, size in zip(starts.tolist(), sizes, strict=False)
    ]
    return torch.cat(held).argsort()


def _micro_batch(
    annotated: Sequence[AnnotatedRollout],
    positions: int,
    responses_per_prompt: int,
    drop_truncated: bool,
    stream: Stream | None,
) -> MicroBatch:
    """Returns the micro-batch on the CPU."""
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
    truncated = torch.tensor([rollout.finish_reason == "length" for rollout in rollouts], dtype=torch.bool)
    indices = [rollout.slot * responses_per_prompt + rollout.response_index for rollout in rollouts]
    annotations = torch.tensor([item.annotations for item in annotated], dtype=torch.float32)
    kept = ~truncated if drop_truncated else torch.ones_like(truncated)
    return MicroBatch(
        tokens=tokens,
        targets=targets,
        loss_mask=loss_mask,
        prompt_mask=prompt_mask,
        num_response_tokens=loss_mask.sum(dim=1),
        rollout_log_probs=rollout_log_probs,
        rollout_index=torch.tensor(indices, dtype=torch.int64),
        group=torch.tensor([rollout.slot for rollout in rollouts], dtype=torch.int64),
        psi=torch.tensor([item.psi for item in annotated], dtype=torch.float32),
        reward=torch.tensor([item.reward for item in annotated], dtype=torch.float32),
        truncated=truncated,
        kept=kept,
        annotations=annotations.reshape(size, len(ANNOTATION_COLUMNS)),
        lag=torch.tensor([item.lag for item in annotated], dtype=torch.float32).reshape(size, len(LAG_COLUMNS)),
        responses=chosen_tokens(loss_mask, stream),
        prompts=chosen_tokens(prompt_mask, stream),
        stream=stream,
    )
