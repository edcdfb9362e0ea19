"""Transformer Engine's attention with our KV cache beside it. Imported only where Transformer Engine is."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

from megatron_powerflow.model.attention import cached_attention, rule_of
from megatron_powerflow.model.kv_cache import KVCache

__all__ = ["CachedTEAttention", "TENorm"]


class CachedTEAttention(TEDotProductAttention):
    """Transformer Engine in training and scoring; torch's SDPA over the cache while decoding."""

    def __init__(self, config, layer_number: int, *args, softmax_scale=None, **kwargs) -> None:
        super().__init__(config, layer_number, *args, softmax_scale=softmax_scale, **kwargs)
        self.rule = rule_of(config, layer_number, softmax_scale)  # no cap: a model with one has our own layers
        self.kv_cache: tuple[KVCache, int] | None = None

    def forward(self, query, key, value, *args, **kwargs):
        if self.kv_cache is not None:
            return cached_attention(query, key, value, *self.kv_cache, self.rule)
        return super().forward(query, key, value, *args, **kwargs)
