"""Where does each token of a micro-batch stand in the model's stream, and how do its numbers find back to their row?

A micro-batch without a `Stream` goes through the model as it is; then these functions are the identity. Megatron learns
of a stream through `packed_seq_params`, which its recomputation carries along: on Transformer Engine's kernels they are
its own for packed sequences, elsewhere they are `Pieces`, which only our core attention reads.

Left out: the attention itself (`attention.py`), making the streams (`data/packing.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_powerflow.parallel.collectives import sum_over
from megatron_powerflow.records import ChosenTokens, MicroBatch, Piece, Stream


@dataclass
class Pieces(PackedSeqParams):
    """What `SdpaCoreAttention` needs of a `Stream`. `qkv_format` is not thd, so Megatron keeps [t, b, heads, d]."""

    pieces: tuple[Piece, ...] = ()
    positions: Tensor | None = None  # for latent attention, which rotates in each layer
    key_order: Tensor | None = None
    key_group: dist.ProcessGroup | None = None  # ranks that hold the other keys


def pieces_of(stream: Stream, cp_group: dist.ProcessGroup) -> Pieces:
    """Return the packed_seq_params of a stream for our core attention. The rotation must be given its `positions`."""
    return Pieces(
        qkv_format="sbhd",
        max_seqlen_q=stream.longest,
        max_seqlen_kv=stream.longest,
        pieces=stream.pieces,
        positions=stream.positions,
        key_order=stream.key_order,
        key_group=cp_group if stream.key_order is not None else None,
    )


def thd_of(stream: Stream) -> PackedSeqParams | None:
    """Return the packed_seq_params of a stream for Transformer Engine; None for rows.

    Transformer Engine splits over cp as `Stream` says, and Megatron rotates by cu_seqlens; the fields are set as in
    Megatron's own use of them.
    """
    if stream.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=stream.cu_seqlens,
        cu_seqlens_kv=stream.cu_seqlens,
        max_seqlen_q=stream.longest,
        max_seqlen_kv=stream.longest,
    )


class Extent(NamedTuple):
    """The size of what goes through the model, all context-parallel ranks together."""

    positions: int
    rows: int


def extent(batch: MicroBatch) -> Extent:
    """Return the extent of a micro-batch in the model: that of its stream, or of its rows where it has none."""
    if batch.stream is None:
        return Extent(positions=batch.tokens.shape[1], rows=batch.tokens.shape[0])
    return Extent(positions=batch.stream.num_positions, rows=batch.stream.index.shape[0])


def model_tokens(batch: MicroBatch) -> Tensor:
    """Return the tokens that this rank's embedding reads: [r, t / cp] int64, 0 where there is padding."""
    if batch.stream is None:
        return batch.tokens
    index = batch.stream.index
    if not batch.tokens.numel():
        return torch.zeros_like(index)
    return torch.where(index >= 0, batch.tokens.flatten()[index.clamp(min=0)], 0)


def chosen_states(hidden: Tensor, chosen: ChosenTokens) -> Tensor:
    """Return the hidden states of some tokens of this rank: of [t / cp, r, H], [k, H]. The GPU is not waited for."""
    return hidden.flatten(0, 1).index_select(0, chosen.in_model)


def to_rows(values: Tensor, chosen: ChosenTokens, batch: MicroBatch, cp_group: dist.ProcessGroup) -> Tensor:
    """Put numbers of this rank's tokens where those stand in the rows of the micro-batch, and 0 elsewhere.

    values: [k], of the chosen tokens. Returns [b, s], whole on every rank of cp_group. Collective over
    cp_group where there is a stream.
    The gradient of a number goes back to the one rank that has its token, unchanged: every rank of cp_group computes
    the whole loss, and all of them have the whole gradient of it (a sum there would count it cp times).
    """
    rows = values.new_zeros(batch.tokens.numel()).index_put((chosen.in_rows,), values).reshape(batch.tokens.shape)
    return rows if batch.stream is None else sum_over(rows, cp_group)


def pool_prompts(hidden: Tensor, batch: MicroBatch, cp_group: dist.ProcessGroup) -> Tensor:
    """Return the mean of hidden [t / cp, r, H] over the prompt tokens of each rollout: [b, H] fp32, equal on every rank
    of cp_group. Collective over cp_group."""
    rows, width = batch.tokens.shape
    tokens = chosen_states(hidden, batch.prompts).float()
    sums = tokens.new_zeros(rows, tokens.shape[1]).index_add(0, batch.prompts.in_rows // width, tokens)
    # numerator over the ranks that hold a piece of the prompt, and the count of the whole prompt: a mean of the ranks'
    # means would weigh a short piece like a long one
    return sum_over(sums, cp_group) / batch.prompt_mask.sum(dim=1, keepdim=True)
