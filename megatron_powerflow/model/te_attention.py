"""How does Transformer Engine's attention decode? Through our KV cache, with torch's SDPA.

This module is imported only where Transformer Engine is installed.
"""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

from megatron_powerflow.model.attention import cached_attention, rule_of
from megatron_powerflow.model.kv_cache import LayerCache

__all__ = ["CachedTEAttention", "TENorm"]


class CachedTEAttention(TEDotProductAttention):
    """Transformer Engine's core attention in training and scoring, and torch's SDPA over the cache while decoding."""

    def __init__(self, config, layer_number: int, *args, softmax_scale=None, **kwargs) -> None:
        super().__init__(config, layer_number, *args, softmax_scale=softmax_scale, **kwargs)
        self.rule = rule_of(config, layer_number, softmax_scale)  # no cap: a model with one has our own layers
        self.kv_cache: LayerCache | None = None  # set while decoding

    def forward(self, query, key, value, *args, **kwargs):
        if self.kv_cache is not None:
            return cached_attention(query, key, value, *self.kv_cache, self.rule)
        return super().forward(query, key, value, *args, **kwargs)
