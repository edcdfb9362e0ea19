"""OLMo 2: Llama's products with norms in other places.

Oddities: no norm before attention and MLP, one behind each, before the residual is added; queries and keys are normed
over all heads of a token together, after the projection, so under tensor parallelism the norm spans the ranks.
"""

from megatron_powerflow.hf.families.llama import ATTENTION, DEFAULTS, LAYER_OPS, MODEL_OPS
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import Replicated

NORMS = (
    Replicated("self_attention.q_layernorm.weight", ATTENTION + "q_norm.weight", size="query_width"),
    Replicated("self_attention.k_layernorm.weight", ATTENTION + "k_norm.weight", size="key_width"),
    Replicated("self_attn_bda.norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    Replicated("mlp_bda.norm.weight", "model.layers.{layer}.post_feedforward_layernorm.weight"),
)

FAMILY = Family(
    model_type="olmo2",
    defaults={**DEFAULTS, "rms_norm_eps": 1e-5},
    must_be={"hidden_act": "silu"},
    overrides=lambda fields: {"qk_norm": True, "qk_norm_over_heads": True, "pre_norm": False, "post_norm": True},
    layer_ops=(*(op for op in LAYER_OPS if "layernorm" not in op.megatron), *NORMS),
    model_ops=MODEL_OPS,
    nullable=("num_key_value_heads",),
)
