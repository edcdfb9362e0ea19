"""Mistral: Llama's tensors. Oddities: 8 key-value heads and a sliding window of 4096 where the file is silent.

`sliding_window: null` means none, and null is what v0.2 and later state.
"""

from megatron_powerflow.hf.families.llama import DEFAULTS, LAYER_OPS, MODEL_OPS
from megatron_powerflow.hf.family import Family

FAMILY = Family(
    model_type="mistral",
    defaults={**DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    must_be={"hidden_act": "silu"},
    overrides=lambda fields: {"sliding_window": fields["sliding_window"]},
    layer_ops=LAYER_OPS,
    model_ops=MODEL_OPS,
    nullable=("head_dim",),
)
