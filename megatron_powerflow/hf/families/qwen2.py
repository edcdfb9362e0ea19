"""Qwen2, Qwen2.5, Qwen2.5-Math: Llama's tensors plus a bias on q, k and v that no config field announces.

Oddities: 32 key-value heads where the file is silent; a sliding window stated in the file but switched
off by `use_sliding_window: false`, as every released checkpoint has it. Switched on, it is that of the layers from
max_window_layers on, or of those that layer_types names.
"""

from collections.abc import Mapping
from typing import Any

from megatron_powerflow.hf.config import windows_by_layer
from megatron_powerflow.hf.families.llama import ATTENTION, DEFAULTS, LAYER_OPS, MODEL_OPS
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import Qkv

BIAS = Qkv(
    "self_attention.linear_qkv.bias", ATTENTION + "q_proj.bias", ATTENTION + "k_proj.bias", ATTENTION + "v_proj.bias"
)
WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}


def windows_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Architecture fields of the sliding window of Qwen2 and Qwen3, none where it is switched off."""
    window = fields["sliding_window"] if fields["use_sliding_window"] else None
    default = [layer >= fields["max_window_layers"] for layer in range(fields["num_hidden_layers"])]
    return windows_by_layer(window, fields.get("layer_types"), default)


FAMILY = Family(
    model_type="qwen2",
    defaults={**DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32768, **WINDOW},
    must_be={"hidden_act": "silu"},
    overrides=lambda fields: {"qkv_bias": True, **windows_of(fields)},
    layer_ops=(*LAYER_OPS, BIAS),
    model_ops=MODEL_OPS,
    nullable=("num_key_value_heads",),
)
