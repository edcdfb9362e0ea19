"""Qwen2, Qwen2.5, Qwen2.5-Math: Llama's tensors plus a bias on q, k and v that no config field announces.

Oddities: 32 key-value heads where the file is silent; a sliding window stated in the file but switched
off by `use_sliding_window: false`, as every released checkpoint has it.
"""

from megatron_powerflow.conversion.families.llama import ATTENTION, DEFAULTS, LAYER_OPS, MODEL_OPS
from megatron_powerflow.conversion.hf_config import Family
from megatron_powerflow.conversion.ops import Qkv

BIAS = Qkv(
    "self_attention.linear_qkv.bias", ATTENTION + "q_proj.bias", ATTENTION + "k_proj.bias", ATTENTION + "v_proj.bias"
)

FAMILY = Family(
    model_type="qwen2",
    defaults={**DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    must_be={"hidden_act": "silu", "use_sliding_window": False},
    overrides=lambda fields: {"qkv_bias": True},
    layer_ops=(*LAYER_OPS, BIAS),
    model_ops=MODEL_OPS,
)
