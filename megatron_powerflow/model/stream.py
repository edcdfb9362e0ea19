"""Where does each token of a micro-batch stand in the model's stream, and how do its numbers find back to their row?

A micro-batch without a `Stream` goes through the model as it is; then all of this is the identity. Megatron learns of a
stream through `packed_seq_params`, which its recomputation carries along: Transformer Engine's own for packed sequences
on its kernels; `Pieces`, which only our core attention reads, elsewhere.

Left out: the attention itself (`attention.py`), making the streams (`data/packing.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_powerflow.parallel.collectives import sum_over
from megatron_powerflow.records import MicroBatch, Piece, Stream


@dataclass
class Pieces(PackedSeqParams):
    """What `SdpaCoreAttention` needs of a `Stream`. `qkv_format` is not thd, so Megatron keeps [t, b, heads, d]."""

    pieces: tuple[Piece, ...] = ()
    positions: Tensor | None = None  # for latent attention, which rotates in each layer
    key_order: Tensor | None = None
    key_group: dist.ProcessGroup | None = None  # ranks that hold the other keys


def pieces_of(stream: Stream, cp_group: dist.ProcessGroup) -> Pieces:
    """For our core attention, with `positions` given to the rotation."""
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
    """For Transformer Engine, which splits over cp as `Stream` says and rotates by cu_seqlens itself. None: rows.
    Written after Megatron's own use of it."""
    if stream.cu_seqlens is None:
        return None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=stream.cu_seqlens,
        cu_seqlens_kv=stream.cu_seqlens,
        max_seqlen_q=stream.longest,
        max_seqlen_kv=stream.longest,
    )


def extent(batch: MicroBatch) -> tuple[int, int]:
    """(positions, rows) of what goes through the model, all context-parallel ranks together."""
    if batch.stream is None:
        return batch.tokens.shape[1], batch.tokens.shape[0]
    return batch.stream.num_positions, batch.stream.index.shape[0]


def model_tokens(batch: MicroBatch) -> Tensor:
    """[r, t / cp] int64: what this rank's embedding reads."""
    if batch.stream is None:
        return batch.tokens
    index = batch.stream.index
    if not batch.tokens.numel():
        return torch.zeros_like(index)
    return torch.where(index >= 0, batch.tokens.flatten()[index.clamp(min=0)], 0)


def chosen(mask: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """mask [b, s] -> ([r, t / cp] bool, True on this rank's tokens that it marks; their places [k] in flat rows)."""
    if batch.stream is None:
        return mask, mask.flatten().nonzero().squeeze(1)
    index = batch.stream.index
    if not mask.numel():
        return torch.zeros_like(index, dtype=torch.bool), index.new_zeros(0)
    here = (index >= 0) & mask.flatten()[index.clamp(min=0)]
    return here, index[here]


def to_rows(values: Tensor, places: Tensor, batch: MicroBatch, cp_group: dist.ProcessGroup) -> Tensor:
    """[k] numbers of this rank's tokens at `places` -> [b, s], 0 elsewhere, whole on every context-parallel rank.

    The gradient of a number goes back to the one rank that has its token, unchanged: every rank of cp_group computes
    the whole loss, and all of them have the whole gradient of it (a sum there would count it cp times).
    """
    rows = values.new_zeros(batch.tokens.numel()).index_put((places,), values).reshape(batch.tokens.shape)
    return rows if batch.stream is None else sum_over(rows, cp_group)


def pool_prompts(hidden: Tensor, batch: MicroBatch, cp_group: dist.ProcessGroup) -> Tensor:
    """Mean of hidden [t / cp, r, H] over the prompt tokens of each rollout -> [b, H] fp32, alike on all of cp_group."""
    mask, places = chosen(batch.prompt_mask, batch)
    rows, width = batch.tokens.shape
    tokens = hidden.transpose(0, 1)[mask].float()
    sums = tokens.new_zeros(rows, tokens.shape[1]).index_add(0, places // width, tokens)
    # numerator over the ranks that hold a piece of the prompt, and the count of the whole prompt: a mean of the ranks'
    # means would weigh a short piece like a long one
    return sum_over(sums, cp_group) / batch.prompt_mask.sum(dim=1, keepdim=True)
