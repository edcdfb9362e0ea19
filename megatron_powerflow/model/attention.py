"""How do queries meet keys?

The core attention of this module runs on torch's scaled_dot_product_attention, and by hand where scores are capped.
It replaces Megatron's unfused `DotProductAttention` in the local layer spec: it never builds [b, heads, s, s] and
knows our KV cache. Beside Transformer Engine, `CachedTEAttention` does the same for decoding and leaves training to
Transformer Engine.

Packed and context-parallel sequences come in pieces of queries with the keys they see. Keys and values are gathered
over the context-parallel ranks; a ring would overlap that with computing and need less memory: Transformer Engine has
one.

A sliding window is a mask: a layer with one keeps all its keys and values and computes with all of them, except that
`pieced_attention` passes over those that no query of a piece sees. Capped scores (Gemma 2), which SDPA does not know,
are held as [heads, queries, keys] and saved for the backward pass; model.recompute=selective avoids the latter.

Left out: rotary embedding outside decoding (applied before, by Megatron's SelfAttention); a fused kernel for capped
scores, and a cache that forgets what has left the window.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from megatron_powerflow.model.kv_cache import KVCache, LayerCache
from megatron_powerflow.model.length_step import rounded_up
from megatron_powerflow.model.rotary import rotate
from megatron_powerflow.model.stream import Pieces
from megatron_powerflow.parallel.collectives import gather_over


class Rule(NamedTuple):
    """How a layer attends.

    scale: what scores are multiplied by; None: 1 / sqrt(d). window: the number of keys that a query sees, its own
    included; None: all before it. softcap: scores s become softcap * tanh(s / softcap); None: they stay as they are.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


def rule_of(config, layer_number: int, softmax_scale: float | None, softcap: float | None = None) -> Rule:
    """Return the rule of a layer, which is counted from 1 over the whole model. config: Megatron's, whose fields say
    which layers have the sliding window."""
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    return Rule(softmax_scale, config.window_size[0] + 1 if windowed else None, softcap)


class SdpaCoreAttention(nn.Module):
    """Causal self-attention over right-padded rows, over the `Pieces` of streams, or through a KV cache.

    Megatron's SelfAttention builds it. forward: query [s, b, heads/tp, d], key and value [s, b, groups/tp, d];
    returns [s, b, heads/tp * d]. Padding stands behind the real tokens, so the causal mask hides it from them.
    """

    def __init__(
        self, config, layer_number: int, attn_mask_type, attention_type: str, softmax_scale=None, softcap=None, **_
    ) -> None:
        super().__init__()
        assert attention_type == "self", attention_type
        assert config.attention_dropout == 0.0, "attention dropout would make log-probs random"
        self.rule = rule_of(config, layer_number, softmax_scale, softcap)
        self.kv_cache: LayerCache | None = None  # set while decoding

    def forward(
        self, query, key, value, attention_mask, *, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        assert attention_bias is None
        if self.kv_cache is not None:
            return cached_attention(query, key, value, *self.kv_cache, self.rule)
        if packed_seq_params is not None:
            return pieced_attention(query, key, value, packed_seq_params, self.rule)
        # [s, b, h, d] -> [b, h, s, d]
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = causal_attention(q, k, v, self.rule)
        return out.permute(2, 0, 1, 3).flatten(2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Attend causally, the last query standing at the last key.

    q: [b, h, s, d]; k, v: [b, g, t, d] with t >= s, where g divides h. Returns [b, h, s, d] in q's dtype.
    """
    k, v = _spread_groups(k, q.shape[1]), _spread_groups(v, q.shape[1])
    num_queries, num_keys = q.shape[2], k.shape[2]
    window = rule.window if rule.window is not None and rule.window < num_keys else None  # None: it hides nothing
    if num_queries == num_keys and window is None and rule.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=rule.scale)
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    if window is not None:
        seen = seen.triu(num_keys - num_queries - window + 1)
    return masked_attention(q, k, v, seen, rule)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Attend to the keys that a mask leaves visible.

    q: [b, h, s, d]; k, v: [b, h, t, d], or what broadcasts to it. mask: broadcast to [b, h, s, t]; bool, True where a
    key is seen, or of q's dtype, 0 there and -inf elsewhere; every query must see a key. rule: its window is not
    applied, for the mask has it already. Returns [b, h, s, d] in q's dtype.
    """
    if rule.softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=rule.scale)
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if rule.scale is None else rule.scale)
    scores = (scores / rule.softcap).tanh() * rule.softcap
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    # softmax in fp32 (or wider), as SDPA and transformers have it
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype) @ v


def pieced_attention(query: Tensor, key: Tensor, value: Tensor, stream: Pieces, rule: Rule) -> Tensor:
    """Attend piece by piece: the queries of a `Piece` to the keys that it names. Whole sequences of one length, which
    stand behind each other since packing sorts by length, are attended to at a time.

    query: [t / cp, b, h, d]; key, value: [t / cp, b, g, d], those of this rank. Returns [t / cp, b, h * d].
    Collective over cp_group, which keys and values are gathered over.
    """
    if stream.key_group is not None:
        assert stream.key_order is not None, "key_order comes with key_group"
        both = gather_over(torch.cat([key, value], dim=-1), stream.key_order, stream.key_group)
        key, value = both.split((key.shape[-1], value.shape[-1]), dim=-1)
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    if stream.key_group is None:
        return _whole_sequences(q, k, v, stream, rule)
    parts = []
    for first, end, first_key, end_key in stream.pieces:  # the last query sees the last key
        if rule.window is not None:  # keys that no query of the piece sees any more
            first_key = max(first_key, end_key - (end - first) - rule.window + 1)
        piece_k, piece_v = (tensor[:, :, first_key:end_key] for tensor in (k, v))
        parts.append(causal_attention(q[:, :, first:end], piece_k, piece_v, rule))
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3).flatten(2)


def _whole_sequences(q: Tensor, k: Tensor, v: Tensor, stream: Pieces, rule: Rule) -> Tensor:
    """Attend within each sequence of a stream: q [1, h, t, d]; k, v [1, g, t, d]. Returns [t, 1, h * d]."""
    parts = []
    for size, run in groupby(stream.pieces, key=lambda piece: piece.end - piece.first):
        pieces = list(run)
        shares = (tensor[0, :, pieces[0].first : pieces[-1].end] for tensor in (q, k, v))
        # [h, n * size, d] -> [n, h, size, d]
        own_q, own_k, own_v = (share.unflatten(1, (-1, size)).transpose(0, 1) for share in shares)
        out = causal_attention(own_q, own_k, own_v, rule)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts).flatten(1)[:, None]


def cached_attention(query: Tensor, key: Tensor, value: Tensor, cache: KVCache, layer: int, rule: Rule) -> Tensor:
    """Rotate the new queries and keys, store the new keys and values, and attend to what each row holds.

    query: [t, 1, h, d]; key, value: [t, 1, g, d]: the flat tokens of `KVCache.prefilling` or `KVCache.decoding`, not
    yet rotated where the cache has a rotation. The values' d may be another. layer: its index in cache.layers, which
    this writes to. Returns [t, 1, h * d]; tokens beyond those the cache expects are padding and come back as zeros.
    """
    if cache.rotation is not None:
        both = rotate(torch.cat((query, key), dim=2), *cache.rotation)
        query, key = both.split((query.shape[2], key.shape[2]), dim=2)
    if cache.segments is not None:
        return _prefill(query, key, value, cache, layer, rule)
    assert cache.key_indices is not None, "only in a pass of `KVCache.decoding`"
    num_rows, num_groups = cache.num_rows, key.shape[2]
    for stored, new in zip(cache.layers[layer], (key, value), strict=True):
        stored.view(-1, new.shape[3]).index_copy_(0, cache.key_indices, new[:num_rows].reshape(-1, new.shape[3]))
    k, v = (stored[:num_rows, :, : cache.max_length] for stored in cache.layers[layer])
    # heads of one group stand together: [rows, g, h/g, d] lets one key serve them without a copy
    q = query[:num_rows, 0].unflatten(1, (num_groups, -1))
    out = masked_attention(q, k, v, cache.mask(rule.window), rule).flatten(1)[:, None]
    padding = query.shape[0] - num_rows
    return out if padding == 0 else F.pad(out, (0, 0, 0, 0, 0, padding))


def _prefill(query: Tensor, key: Tensor, value: Tensor, cache: KVCache, layer: int, rule: Rule) -> Tensor:
    """Attend within each prompt by itself, and store its keys and values in every row of its segment.

    A prompt is followed by zeros up to a multiple of the cache's length_step; the causal mask hides them from it.
    """
    assert cache.segments is not None, "only in a pass of `KVCache.prefilling`"
    keys, values = cache.layers[layer]
    out = value.new_zeros(*query.shape[:3], value.shape[3])
    for rows, start, stop in cache.segments:
        length = stop - start
        # [len, 1, g, d] -> [1, g, len, d]
        q, k, v = (tensor[start:stop].permute(1, 2, 0, 3) for tensor in (query, key, value))
        keys[rows, :, :length], values[rows, :, :length] = k, v
        if extra := rounded_up(length, cache.length_step) - length:
            q, k, v = (F.pad(tensor, (0, 0, 0, extra)) for tensor in (q, k, v))
        out[start:stop] = causal_attention(q, k, v, rule)[:, :, :length].permute(2, 0, 1, 3)
    return out.flatten(2)


def _spread_groups(tensor: Tensor, num_heads: int) -> Tensor:
    """Repeat the key or value of each group for each of its heads: [b, g, s, d] -> [b, num_heads, s, d]."""
    repeats = num_heads // tensor.shape[1]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)
