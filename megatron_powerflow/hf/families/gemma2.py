"""Gemma 2: Llama's products with four norms a layer, caps on attention scores and logits, and a window in every other
layer.

Oddities: norms multiply by 1 + weight; the MLP's gate is a GELU (tanh); embeddings are multiplied by sqrt(hidden_size),
rounded to their dtype; scores are scaled by query_pre_attn_scalar, whatever head_dim is, and capped, as the logits are;
the first, third, ... layers have the sliding window where the file has no layer_types; embeddings are tied.
hidden_activation counts, and hidden_act, which released files have as well, must agree.
"""

from megatron_powerflow.hf.config import windows_by_layer
from megatron_powerflow.hf.families.llama import DEFAULTS, LAYER_OPS, MODEL_OPS, head_violations
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import Replicated

LAYER = "model.layers.{layer}."
NORMS = (
    Replicated("input_layernorm.weight", LAYER + "input_layernorm.weight"),
    Replicated("self_attn_bda.norm.weight", LAYER + "post_attention_layernorm.weight"),
    Replicated("pre_mlp_layernorm.weight", LAYER + "pre_feedforward_layernorm.weight"),
    Replicated("mlp_bda.norm.weight", LAYER + "post_feedforward_layernorm.weight"),
)


def _violations(fields):
    violations = head_violations(fields)
    if fields["sliding_window"] is None:  # transformers asks for one even where no layer has it
        violations.append("sliding_window=None is not supported for gemma2; say a number of tokens")
    return violations


FAMILY = Family(
    model_type="gemma2",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    must_be={"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"},
    overrides=lambda fields: {
        "post_norm": True,
        "zero_centered_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "softmax_scale": fields["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": fields["attn_logit_softcapping"],
        "logit_softcap": fields["final_logit_softcapping"],
        **windows_by_layer(
            fields["sliding_window"],
            fields.get("layer_types"),
            [layer % 2 == 0 for layer in range(fields["num_hidden_layers"])],
        ),
    },
    layer_ops=(*(op for op in LAYER_OPS if "layernorm" not in op.megatron), *NORMS),
    model_ops=MODEL_OPS,
    sizes=("query_pre_attn_scalar",),
    violations=_violations,
)
