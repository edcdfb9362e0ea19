"""Which changes of a config.json are tried? For each family, every field with values that a file may have, right or
wrong, and sets of fields that speak of one thing.

Left out: what comes of a change (`distributed/test_perturbed_configs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.tiny_models import FAMILIES

REMOVED = "<removed>"  # the field is taken out of the file
Changes = Mapping[str, Any]  # field, or "rope_parameters.factor" for one within -> value

LINEAR = {"rope_type": "linear", "factor": 2.0}
OLD_LINEAR = {"type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0, 10.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
THETA = {"rope_theta": 1e4}
WINDOW, FULL = "sliding_attention", "full_attention"


def without(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def stretched(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each number of a way of stretching as another number, as none, as a word, and not there."""
    found = []
    for key, value in values.items():
        if key in ("rope_type", "type"):
            continue
        others = [None, "4", 0, -1.0, True]
        others += [value[:-1], [*value[:-1], "x"]] if isinstance(value, list) else [value * 2, value / 2]
        found += [without(values, key), *({**values, key: other} for other in others)]
    return found


ROPES: tuple[Any, ...] = (
    *(None, {}, [], "linear", 4.0, {"factor": 2.0}, {"rope_type": None}, {"rope_type": "mrope"}),
    *(THETA, {"rope_theta": 500.0}, {"rope_theta": None}, {"rope_theta": "1e4"}, {"rope_theta": 0}, {"rope_theta": 1}),
    *({"rope_theta": -10000.0}, {"rope_theta": True}, {"rope_theta": 10000}),
    *(LINEAR, LINEAR | THETA, OLD_LINEAR, OLD_LINEAR | {"rope_type": "default"}, DYNAMIC, LLAMA3, YARN, LONG),
    *(LLAMA3 | {"rope_theta": 500.0}, YARN | {"rope_theta": 500.0}, LONG | {"type": "su"}),
    {**without(LONG, "rope_type"), "type": "su"},
    {FULL: {"rope_type": "default", **THETA}, WINDOW: {"rope_type": "default", "rope_theta": 100.0}},
    *(LINEAR | {"partial_rotary_factor": value} for value in (0.5, 1.0, None, "1")),
    *(THETA | {"partial_rotary_factor": value} for value in (0.5, 1.0, 0, None, "1", 2.0)),
)
STRETCHED = (
    *stretched(LINEAR),
    *stretched(LLAMA3),
    *stretched(YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0}),
    *(YARN | {"attention_factor": value} for value in (1.2, 2, 0.0, -1.0, None, "1", True)),
    *(YARN | {"truncate": value} for value in (False, True, None, 0)),
    *stretched(LONG),
    *(LONG | {"attention_factor": value} for value in (1.2, 2, 0.0, None, "1", True)),
    *(LONG | {"factor": value} for value in (4.0, 2.0, None, "4")),
)

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "moe_intermediate_size", "num_experts", "num_local_experts"),
    *("n_routed_experts", "n_shared_experts", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    *("v_head_dim", "qk_head_dim"),
)
FLAGS = (
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob", "rope_interleave"),
    *("use_bidirectional_attention", "is_causal", "use_cache", "output_router_logits", "is_encoder_decoder"),
    *("lm_head_bias", "use_qk_norm", "output_hidden_states", "return_dict", "output_attentions"),
)
MULTIPLIERS = ("attention_multiplier", "logits_scaling", "embedding_multiplier", "residual_multiplier")
# field -> values, tried in every family whether its class has the field or not
FIELDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(SIZES, (REMOVED, None, 0, -1, 1, 2, 3, 6, 12.0, "4", True, [4])),
    **dict.fromkeys(FLAGS, (REMOVED, None, True, False, 0, 1, "false")),
    **dict.fromkeys(MULTIPLIERS, (None, 1.0, 1, 2.0)),
    "rope_theta": (REMOVED, None, 500.0, 10000, 10000.0, 0, "1e4"),
    "rope_parameters": ROPES,
    "rope_scaling": (None, {}, LINEAR, LINEAR | THETA, OLD_LINEAR, THETA, "linear", []),
    "partial_rotary_factor": (None, 0.5, 1.0, 1, 0, "1"),
    "original_max_position_embeddings": (REMOVED, None, 16, 64, "64", 0),
    "max_position_embeddings": (REMOVED, None, 64, 128, 1, 0, 256.0, "256"),
    "rms_norm_eps": (REMOVED, None, 1e-3, 1e-6, 0.0, 1, -1.0, "1e-6", True),
    "layer_norm_eps": (1e-3,),
    "hidden_act": (REMOVED, None, "gelu", "gelu_pytorch_tanh", "swish", "x", 1),
    "hidden_activation": (REMOVED, None, "gelu", "gelu_pytorch_tanh", "silu"),
    "sliding_window": (REMOVED, None, 0, -1, 1, 5, 64, 5.0, "5", True),
    "max_window_layers": (REMOVED, None, 0, 2, 9, -1, "2"),
    "layer_types": (
        *(REMOVED, None, [], "full", [FULL] * 4, [WINDOW] * 4, [FULL, WINDOW] * 2, [WINDOW, FULL] * 2, [FULL] * 3),
        *(["attention"] * 4, ["chunked_attention"] * 4, [None] * 4, {"0": FULL}),
    ),
    "attention_chunk_size": (None, 4),
    "no_rope_layers": (None, [], [0, 1]),
    "attention_dropout": (REMOVED, None, 0, 0.0, 0.1, "0"),
    "hidden_dropout": (0.1,),
    "resid_pdrop": (REMOVED, None, 0, 0.1, "0"),
    "embd_pdrop": (REMOVED, None, 0, 0.1, "0"),
    "logit_scale": (2.0,),
    "clip_qkv": (None, 1.0),
    "query_pre_attn_scalar": (REMOVED, None, 12, 24, 24.0, "24", 0),
    "attn_logit_softcapping": (REMOVED, None, 1.5, 2, 0.0, -1.0, "2", True),
    "final_logit_softcapping": (REMOVED, None, 1.5, 3, 0.0, -1.0, "3", True),
    "num_experts_per_tok": (REMOVED, None, 1, 2, 3, 4, 9, 0, -1, "2", 2.0, True),
    "routed_scaling_factor": (REMOVED, None, 1.0, 1, 2.0, 0.0, -1.0, "1"),
    "n_group": (REMOVED, None, 1, 2, 3, 0, "2"),
    "topk_group": (REMOVED, None, 1, 3, 4, 9, 0, "2"),
    "scoring_func": (None, "softmax", "sigmoid"),
    "topk_method": (None, "greedy", "noaux_tc"),
    "first_k_dense_replace": (REMOVED, None, 0, 2, 9, -1, "1", True),
    "moe_layer_freq": (None, 1, 2),
    "decoder_sparse_step": (REMOVED, None, 0, 1, 2, "1"),
    "mlp_only_layers": (REMOVED, None, [], [0], [9], 0, "x"),
    "router_jitter_noise": (REMOVED, None, 0, 0.1),
    "num_nextn_predict_layers": (REMOVED, None, 0, 1, "x"),
    "num_mtp_layers": (REMOVED, None, 0, 1, "x"),
    "initializer_range": (REMOVED, None, 0.5, 5.0, 0, "x"),
    "router_aux_loss_coef": (REMOVED, None, 0.5, "x"),
    "pretraining_tp": (REMOVED, None, 2, "x"),
    "pad_token_id": (REMOVED, None, 5, -1, 400, "x"),
    "bos_token_id": (REMOVED, None, 5, 400, "x"),
    "architectures": (REMOVED, None, [], ["LlamaModel"], "x"),
    "dtype": (REMOVED, None, "float16", "bfloat16", "x", 1),
    "torch_dtype": ("float16", "x"),
    "quantization_config": (None, {}, {"quant_method": "fp8"}, "x", []),
    "per_layer_config": (None, {}, {"0": {"rms_norm_eps": 0.5}}),
    "transformers_weights": (None, "other.safetensors", "model.safetensors"),
    "configuration_files": (None, ["config.4.0.0.json"]),
    "fusion_config": (None, {}),
    "text_config": ({"rms_norm_eps": 0.5},),
    "auto_map": ({"AutoModelForCausalLM": "modeling_x.Model"},),
    "chunk_size_feed_forward": (REMOVED, 2, "x"),
    "tie_last_hidden_states": (False,),
    "id2label": ({"0": "a"}, "x"),
    "problem_type": ("regression", "x"),
    "transformers_version": (REMOVED, None, "9.0.0", 5),
    "is_llama_config": (True,),
    "a_note": (True, "text", {"a": 1}),
}
# more than one field at once: (families, changes)
TOGETHER: tuple[tuple[tuple[str, ...], Changes], ...] = (
    *(
        (FAMILIES, {"rope_parameters": REMOVED, "rope_scaling": scaling})
        for scaling in (None, {}, LINEAR, OLD_LINEAR, LLAMA3, YARN, LONG, DYNAMIC, "linear", [1])
    ),
    *(
        (FAMILIES, {"rope_parameters": REMOVED, "rope_theta": theta})
        for theta in (REMOVED, 500.0, 10000, None, 0, "1e4", -1.0, True)
    ),
    (FAMILIES, {"rope_parameters": REMOVED, "rope_scaling": OLD_LINEAR, "rope_theta": 500.0}),
    (FAMILIES, {"rope_parameters": LINEAR | THETA, "rope_scaling": LINEAR, "rope_theta": REMOVED}),
    (FAMILIES, {"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": LINEAR}),
    (FAMILIES, {"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": LINEAR, "rope_theta": 500.0}),
    (FAMILIES, {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {"rope_type": "default"}}),
    (FAMILIES, {"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"rope_theta": 500.0}}),
    (FAMILIES, {"rope_parameters": LINEAR | THETA, "partial_rotary_factor": 0.5}),
    (FAMILIES, {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 1.0}),
    (FAMILIES, {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16}),
    (FAMILIES, {"rope_parameters": without(LLAMA3, "original_max_position_embeddings"), "max_position_embeddings": 32}),
    (FAMILIES, {"rope_parameters": YARN, "original_max_position_embeddings": 16}),
    (FAMILIES, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    (FAMILIES, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": REMOVED}),
    (FAMILIES, {"dtype": "float32", "torch_dtype": "float16"}),
    (FAMILIES, {"sliding_window": 5, "use_sliding_window": True}),
    (FAMILIES, {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2, "layer_types": REMOVED}),
    (FAMILIES, {"sliding_window": None, "use_sliding_window": True, "layer_types": REMOVED}),
    (FAMILIES, {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": "2", "layer_types": REMOVED}),
    *(
        (("qwen2", "qwen3", "gemma2"), {"sliding_window": 5, "use_sliding_window": True, "layer_types": layers})
        for layers in ([WINDOW, FULL] * 2, [WINDOW] * 4, [FULL] * 4, None, [WINDOW])
    ),
    (("gemma2", "qwen2"), {"sliding_window": None, "layer_types": [WINDOW, FULL] * 2}),
    (("gemma2",), {"sliding_window": None, "layer_types": [FULL] * 4}),
    (("gemma2",), {"sliding_window": REMOVED, "layer_types": REMOVED}),
    (("gemma2",), {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}),
    (("qwen3_moe",), {"num_experts": 6, "num_local_experts": 5}),
    (("qwen3_moe",), {"num_experts": 5, "num_local_experts": 6}),
    (("qwen3_moe",), {"num_experts": 6, "num_local_experts": REMOVED}),
    (("mixtral",), {"num_experts": 4, "num_local_experts": REMOVED}),
    (("deepseek_v3",), {"num_local_experts": 8, "n_routed_experts": REMOVED}),
    (("deepseek_v3",), {"n_group": 8, "topk_group": 8}),
    (("deepseek_v3",), {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3}),
    (("deepseek_v3",), {"num_key_value_heads": REMOVED, "qk_head_dim": REMOVED, "head_dim": REMOVED}),
    (("phi3",), {"rope_parameters": THETA, "partial_rotary_factor": 0.5}),
    (("phi3",), {"rope_parameters": THETA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.75}),
    (("phi3",), {"rope_parameters": REMOVED, "rope_scaling": LONG, "original_max_position_embeddings": 64}),
    (("phi3",), {"rope_parameters": LONG, "max_position_embeddings": 64}),
    (("phi3",), {"rope_parameters": LONG, "max_position_embeddings": 32}),
    (("phi3",), {"rope_parameters": LONG, "original_max_position_embeddings": 1}),
)


# the ordinary run: one of each kind that was once taken in silence, or ended in a foreign exception
SOME: tuple[tuple[str, Changes], ...] = (
    ("llama", {"rope_parameters": LLAMA3 | THETA, "original_max_position_embeddings": 16}),
    ("llama", {"rope_parameters": without(LLAMA3, "original_max_position_embeddings")}),
    ("llama", {"rope_parameters": LLAMA3 | {"factor": "8"}}),
    ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}}),
    ("llama", {"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": LINEAR}),
    ("llama", {"rope_parameters": LINEAR, "rope_scaling": LINEAR | {"rope_theta": 500.0}}),
    ("llama", {"rope_parameters": LINEAR | {"rope_theta": 500.0}, "rope_scaling": LINEAR, "rope_theta": 500.0}),
    ("llama", {"rope_parameters": "linear"}),
    ("llama", {"rope_parameters": {"rope_theta": 0}}),
    ("llama", {"rope_parameters": REMOVED, "rope_scaling": OLD_LINEAR, "rope_theta": 500.0}),
    ("llama", {"is_causal": False}),
    ("llama", {"return_dict": False}),
    ("llama", {"transformers_weights": "other.safetensors"}),
    ("llama", {"configuration_files": ["config.4.0.0.json"]}),
    ("llama", {"text_config": {"rms_norm_eps": 0.5}}),
    ("llama", {"rms_norm_eps": "1e-6"}),
    ("llama", {"rms_norm_eps": -1.0}),
    ("llama", {"rms_norm_eps": 1e-3}),
    ("llama", {"head_dim": 0}),
    ("llama", {"head_dim": "12"}),
    ("llama", {"attention_bias": None}),
    ("llama", {"pad_token_id": 400}),
    ("llama", {"initializer_range": 5.0}),
    ("llama", {"initializer_range": 0.5}),
    ("llama", {"dtype": "x"}),
    ("llama", {"dtype": "float32", "torch_dtype": "float16"}),
    ("llama", {"hidden_activation": "gelu"}),
    ("llama", {"a_note": {"a": 1}}),
    ("mistral", {"max_position_embeddings": None}),
    ("mistral", {"per_layer_config": {"0": {"rms_norm_eps": 0.5}}}),
    ("mistral", {"sliding_window": 5}),
    ("mistral", {"sliding_window": "5"}),
    ("mistral", {"head_dim": None}),
    ("mistral", {"layer_types": [WINDOW] * 4}),
    ("qwen2", {"tie_word_embeddings": "false"}),
    ("qwen2", {"use_sliding_window": "false"}),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": "2", "layer_types": REMOVED}),
    ("qwen2", {"sliding_window": 5, "use_sliding_window": True, "layer_types": [WINDOW, FULL] * 2}),
    ("qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    ("qwen2", {"rope_parameters": {FULL: {"rope_type": "default", **THETA}}}),
    ("qwen3", {"head_dim": None}),
    ("qwen3", {"num_key_value_heads": 0}),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2, "layer_types": REMOVED}),
    ("qwen3_moe", {"norm_topk_prob": "false"}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"num_experts": 5, "num_local_experts": 6}),
    ("qwen3_moe", {"num_experts_per_tok": 2}),
    ("mixtral", {"num_experts": 4, "num_local_experts": REMOVED}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral", {"rope_parameters": REMOVED, "rope_theta": 1e-3}),
    ("phi3", {"rope_parameters": THETA, "partial_rotary_factor": 0.5}),
    ("phi3", {"rope_parameters": LONG | {"attention_factor": 0.0}}),
    ("phi3", {"rope_parameters": LONG | {"attention_factor": 1.2}}),
    ("phi3", {"rope_parameters": LONG | {"long_factor": [1.0]}}),
    ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 1}),
    ("olmo2", {"rope_parameters": LINEAR | THETA}),
    ("olmo2", {"use_cache": None}),
    ("gemma2", {"sliding_window": None, "layer_types": REMOVED}),
    ("gemma2", {"layer_types": [FULL, WINDOW] * 2}),
    ("gemma2", {"query_pre_attn_scalar": 12}),
    ("gemma2", {"attn_logit_softcapping": 1.5, "final_logit_softcapping": None}),
    ("gemma2", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}),
    ("deepseek_v3", {"head_dim": 12}),
    ("qwen2", {"rope_parameters": YARN | {"beta_fast": 8.0, "mscale": 0.7, "mscale_all_dim": 1.0}}),
    ("qwen2", {"rope_parameters": REMOVED, "rope_scaling": without(YARN, "rope_type") | {"type": "yarn"}}),
    ("llama", {"rope_parameters": YARN, "original_max_position_embeddings": 16}),
    ("olmo2", {"rope_parameters": YARN | {"factor": 0.5}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"truncate": None}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"truncate": False}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "rope_theta": 500.0}}),
    ("deepseek_v3", {"rope_parameters": YARN | {"rope_theta": 1}}),
    ("deepseek_v3", {"routed_scaling_factor": 1}),
    ("deepseek_v3", {"routed_scaling_factor": 1.0, "n_group": 8, "topk_group": 8}),
)


def _cross() -> list[tuple[str, Changes]]:
    found: list[tuple[str, Changes]] = []
    for family in FAMILIES:
        found += [(family, {field: value}) for field, values in FIELDS.items() for value in values]
        found += [(family, {"rope_parameters": {**THETA, **rope}}) for rope in STRETCHED]
    return found + [(family, changes) for families, changes in TOGETHER for family in families]


ALL = _cross()


def changed(config: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """A copy of a config.json's object with the changes made."""
    found = {**config, **changes}
    return {key: value for key, value in found.items() if not (isinstance(value, str) and value == REMOVED)}
