"""Transformer Engine's attention with our KV cache beside it. Imported only where Transformer Engine is."""

from __future__ import annotations

from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

from megatron_powerflow.model.attention import cached_attention
from megatron_powerflow.model.kv_cache import KVCache

__all__ = ["CachedTEAttention", "TENorm"]


class CachedTEAttention(TEDotProductAttention):
    """Transformer Engine in training and scoring; torch's SDPA over the cache while decoding."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kv_cache: tuple[KVCache, int] | None = None

    def forward(self, query, key, value, *args, **kwargs):
        if self.kv_cache is not None:
            return cached_attention(query, key, value, *self.kv_cache, None)
        return super().forward(query, key, value, *args, **kwargs)
