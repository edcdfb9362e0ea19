"""Qwen3 (dense): Llama's tensors plus RMS norms on the query and key of each head.

Oddities: head_dim is 128 where the file is silent, whatever hidden_size / heads gives; no qkv bias;
the sliding window of Qwen2.
"""

from megatron_powerflow.hf.families.llama import ATTENTION, DEFAULTS, LAYER_OPS, MODEL_OPS
from megatron_powerflow.hf.families.qwen2 import WINDOW, windows_of
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import Replicated

NORMS = (
    Replicated("self_attention.q_layernorm.weight", ATTENTION + "q_norm.weight", size="head_dim"),
    Replicated("self_attention.k_layernorm.weight", ATTENTION + "k_norm.weight", size="head_dim"),
)

FAMILY = Family(
    model_type="qwen3",
    defaults={**DEFAULTS, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, **WINDOW},
    must_be={"hidden_act": "silu"},
    overrides=lambda fields: {"qk_norm": True, **windows_of(fields)},
    layer_ops=(*LAYER_OPS, *NORMS),
    model_ops=MODEL_OPS,
    nullable=("num_key_value_heads",),
)
