"""What does each field of a config.json do?

The fields are listed in three groups: those that `config.py` reads for every family, those that change the computation
of some architecture, which every family maps or refuses, and those that change no computation.

Left out: the values (`config.py` and `families/`).
"""

from __future__ import annotations

from typing import Any

# Read for every family, in `config.py`.
READ = frozenset(
    {
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "tie_word_embeddings",
        "max_position_embeddings",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "partial_rotary_factor",
        "layer_types",
        "quantization_config",
    }
)

# Field that some architecture computes with -> the value at which it does nothing. A family that does not map the field
# refuses every other value.
COMPUTING: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "lm_head_bias": False,
    "qkv_bias": False,
    "attention_dropout": 0.0,  # no dropout anywhere: with it a log-prob would be no function of the weights
    "hidden_dropout": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "attention_chunk_size": None,
    "no_rope_layers": [],
    "use_bidirectional_attention": False,
    "is_causal": True,  # false: every token sees those behind it as well
    "is_encoder_decoder": False,
    "return_dict": True,  # false: no model of transformers 5 runs
    "hidden_activation": None,  # another name of hidden_act, or of nothing
    "per_layer_config": None,  # fields that some layers have otherwise
    "text_config": None,
    "configuration_files": None,  # another file in the place of config.json
    "transformers_weights": None,  # another file in the place of model.safetensors
    "fusion_config": None,
    "use_mrope": False,
    "rope_interleaved": False,
    "rope_local_base_freq": None,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "clip_qkv": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "attention_multiplier": 1.0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "scale_attn_by_inverse_layer_idx": False,
    "use_parallel_residual": False,
    "alibi": False,
    "num_nextn_predict_layers": 0,
    "n_shared_experts": 0,
    "shared_expert_intermediate_size": 0,
}

# These fields describe the folder or the tokens, or act in transformers' own training or generation only.
BOOKKEEPING = frozenset(
    {
        "architectures",
        "auto_map",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "initializer_range",
        "use_cache",
        "cache_implementation",
        "pretraining_tp",  # how Llama's reference cut its products; the numbers are the same
        "max_window_layers",  # of use_sliding_window
        "original_max_position_embeddings",  # of rope scaling, which is read or refused
        "router_aux_loss_coef",  # PowerFlow adds no auxiliary loss
        "output_router_logits",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "tokenizer_class",
        "is_llama_config",  # SmolLM2
        "transformers.js_config",
        "task_specific_params",
        "problem_type",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",  # the MLP in parts, the same numbers
        # transformers 4 wrote defaults of generation into config.json
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "repetition_penalty",
        "length_penalty",
        "diversity_penalty",
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
    }
)
