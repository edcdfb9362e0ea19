"""Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini: Llama's layer with q, k and v in one tensor, and gate and up in another.

Oddities: qkv_proj is [q; k; v] and gate_up_proj [gate; up], rows behind each other; Phi-3-mini-4k has a sliding window
in every layer; Phi-4-mini rotates three quarters of each head (partial_rotary_factor). Rope scaling `longrope` (earlier
`su`) takes other factors for sequences over original_max_position_embeddings; the model is read up to there.
"""

from megatron_powerflow.hf.families.llama import ATTENTION, DEFAULTS, LAYER_OPS, MLP, MODEL_OPS
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import Fused, GateUp, Qkv

QKV = Fused(Qkv("self_attention.linear_qkv.weight", "q", "k", "v"), ATTENTION + "qkv_proj.weight")
GATE_UP = Fused(GateUp("mlp.linear_fc1.weight", "gate", "up"), MLP + "gate_up_proj.weight")

FAMILY = Family(
    model_type="phi3",
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
        "pad_token_id": 32000,
    },
    must_be={"hidden_act": "silu", "full_attn_mod": 1, "interpolate_factor": 1},
    overrides=lambda fields: {"sliding_window": fields["sliding_window"]},
    layer_ops=(*(op for op in LAYER_OPS if op.megatron not in (QKV.megatron, GATE_UP.megatron)), QKV, GATE_UP),
    model_ops=MODEL_OPS,
    nullable=("num_key_value_heads",),
    partial_rotary=True,
    rope_types=("default", "longrope"),
)
