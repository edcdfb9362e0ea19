"""Which architecture does a test or a benchmark take that needs no model? A plain llama, but for its changes."""

from __future__ import annotations

from megatron_powerflow.architecture import Architecture, Rope


def make_architecture(**changes) -> Architecture:
    """Make the architecture of SmolLM2-135M, but for the changes."""
    fields = {
        "family": "llama",
        "num_layers": 30,
        "hidden_size": 576,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 9,
        "num_query_groups": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "norm_epsilon": 1e-5,
        "rope": Rope(1e5),
        "tied_embeddings": True,
        "qkv_bias": False,
        "qk_norm": False,
        "max_positions": 8192,
        "sliding_window": None,
    }
    return Architecture(**fields | changes)
