"""Llama 2, 3, 3.1+ (and SmolLM2): the common decoder, from which the others differ by a line or two.

Oddities: 3.1 and later stretch long rope wavelengths (`rope_type: llama3`); 3.2 ties its embeddings.
`attention_bias` and `mlp_bias` exist in the config and in no released model: refused.
"""

from collections.abc import Mapping
from typing import Any

from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import GateUp, Op, Qkv, Replicated, Rows, VocabRows

ATTENTION = "model.layers.{layer}.self_attn."
MLP = "model.layers.{layer}.mlp."

LAYER_OPS: tuple[Op, ...] = (
    Replicated("input_layernorm.weight", "model.layers.{layer}.input_layernorm.weight"),
    Qkv(
        "self_attention.linear_qkv.weight",
        ATTENTION + "q_proj.weight",
        ATTENTION + "k_proj.weight",
        ATTENTION + "v_proj.weight",
    ),
    Rows("self_attention.linear_proj.weight", ATTENTION + "o_proj.weight", inputs="attention"),
    Replicated("pre_mlp_layernorm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
    GateUp("mlp.linear_fc1.weight", MLP + "gate_proj.weight", MLP + "up_proj.weight"),
    Rows("mlp.linear_fc2.weight", MLP + "down_proj.weight", inputs="ffn"),
)
MODEL_OPS: tuple[Op, ...] = (
    VocabRows("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    Replicated("decoder.final_layernorm.weight", "model.norm.weight"),
    VocabRows("output_layer.weight", "lm_head.weight"),
)


def head_violations(fields: Mapping[str, Any]) -> list[str]:
    """Return a violation when hidden_size is no multiple of the heads, which transformers 5 refuses for Llama and Gemma
    2, whatever head_dim says; else nothing."""
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    return [f"num_attention_heads={heads} does not divide hidden_size={hidden}"] if hidden % heads else []


DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "max_position_embeddings": 2048}

FAMILY = Family(
    model_type="llama",
    defaults=DEFAULTS,
    must_be={"hidden_act": "silu"},
    overrides=lambda fields: {},
    layer_ops=LAYER_OPS,
    model_ops=MODEL_OPS,
    nullable=("num_key_value_heads", "head_dim"),
    violations=head_violations,
)
