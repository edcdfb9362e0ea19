"""How do queries meet keys? Core attention on torch's scaled_dot_product_attention.

Takes the place of Megatron's unfused `DotProductAttention` in the local layer spec: it never builds
[b, heads, s, s] and knows our KV cache. Beside Transformer Engine, `CachedTEAttention` does the same for
decoding and leaves training to Transformer Engine.

Packed and context-parallel sequences come in pieces of queries with the keys they see. Keys and values are gathered
over the context-parallel ranks; a ring would overlap that with computing and need less memory: Transformer Engine has
one.

Left out: rotary embedding outside decoding (applied before, by Megatron's SelfAttention).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_powerflow.model.kv_cache import KVCache
from megatron_powerflow.model.rotary import rotate
from megatron_powerflow.model.stream import Pieces
from megatron_powerflow.parallel.collectives import gather_over


class SdpaCoreAttention(nn.Module):
    """Causal self-attention over right-padded rows, over the `Pieces` of streams, or through a `KVCache` when one is
    attached.

    Built by Megatron's SelfAttention; forward: query [s, b, heads/tp, d], key and value [s, b, groups/tp, d];
    returns [s, b, heads/tp * d]. Padding stands behind the real tokens, so the causal mask hides it from them.
    """

    def __init__(self, config, layer_number: int, attn_mask_type, attention_type: str, softmax_scale=None, **_) -> None:
        super().__init__()
        assert attention_type == "self", attention_type
        assert config.attention_dropout == 0.0, "attention dropout would make log-probs random"
        self.softmax_scale = softmax_scale
        self.kv_cache: tuple[KVCache, int] | None = None  # the cache and this layer's place in it

    def forward(
        self, query, key, value, attention_mask, *, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        assert attention_bias is None
        if self.kv_cache is not None:
            return cached_attention(query, key, value, *self.kv_cache, self.softmax_scale)
        if packed_seq_params is not None:
            return pieced_attention(query, key, value, packed_seq_params, self.softmax_scale)
        # [s, b, h, d] -> [b, h, s, d]
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = causal_attention(q, k, v, self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> Tensor:
    """q [b, h, s, d], k and v [b, g, s, d] with g dividing h -> [b, h, s, d]."""
    k, v = _spread_groups(k, q.shape[1]), _spread_groups(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=softmax_scale)


def pieced_attention(query: Tensor, key: Tensor, value: Tensor, stream: Pieces, softmax_scale: float | None) -> Tensor:
    """query [t / cp, b, h, d], key and value [t / cp, b, g, d] of this rank -> [t / cp, b, h * d].
    Collective over cp."""
    if stream.key_group is not None:
        both = gather_over(torch.cat([key, value], dim=-1), stream.key_order, stream.key_group)
        key, value = both.split((key.shape[-1], value.shape[-1]), dim=-1)
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    parts = []
    for first, end, first_key, end_key in stream.pieces:
        own_k, own_v = (_spread_groups(tensor[:, :, first_key:end_key], q.shape[1]) for tensor in (k, v))
        num_queries, num_keys = end - first, end_key - first_key
        mask = None
        if num_queries != num_keys:  # the last query sees the last key
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, first:end], own_k, own_v, attn_mask=mask, is_causal=mask is None, scale=softmax_scale
            )
        )
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3).flatten(2)


def cached_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: KVCache, layer: int, softmax_scale: float | None
) -> Tensor:
    """Rotate, store the new keys and values, attend over what each row holds.

    query [t, 1, h, d], key and value [t, 1, g, d]: flat tokens, not yet rotated where the cache has a rotation, see
    `KVCache.prefilling` and `KVCache.decoding`. The values' d may be another. Returns [t, 1, h * d]; tokens beyond
    those the cache expects are padding and come back as zeros.
    """
    if cache.rotation is not None:
        both = rotate(torch.cat((query, key), dim=2), *cache.rotation)
        query, key = both.split((query.shape[2], key.shape[2]), dim=2)
    if cache.segments is not None:
        return _prefill(query, key, value, cache, layer, softmax_scale)
    num_rows, num_groups = cache.num_rows, key.shape[2]
    for stored, new in zip(cache.layers[layer], (key, value), strict=True):
        stored.view(-1, new.shape[3]).index_copy_(0, cache.places, new[:num_rows].reshape(-1, new.shape[3]))
    k, v = (stored[:, :, : cache.max_length] for stored in cache.layers[layer])
    # heads of one group stand together: [rows, g, h/g, d] lets one key serve them without a copy
    q = query[:num_rows, 0].unflatten(1, (num_groups, -1))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask, scale=softmax_scale).flatten(1)[:, None]
    padding = query.shape[0] - num_rows
    return out if padding == 0 else F.pad(out, (0, 0, 0, 0, 0, padding))


def _prefill(query: Tensor, key: Tensor, value: Tensor, cache: KVCache, layer: int, softmax_scale) -> Tensor:
    """Each prompt by itself; its keys and values go to every row of its group."""
    keys, values = cache.layers[layer]
    out = value.new_zeros(*query.shape[:3], value.shape[3])
    for rows, start, stop in cache.segments:
        # [len, 1, g, d] -> [1, g, len, d]
        q, k, v = (tensor[start:stop].permute(1, 2, 0, 3) for tensor in (query, key, value))
        keys[rows, :, : stop - start], values[rows, :, : stop - start] = k, v
        out[start:stop] = causal_attention(q, k, v, softmax_scale).permute(2, 0, 1, 3)
    return out.flatten(2)


def _spread_groups(tensor: Tensor, num_heads: int) -> Tensor:
    """[b, g, s, d] -> [b, num_heads, s, d]: the key or value of a group for each of its heads."""
    repeats = num_heads // tensor.shape[1]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)
