"""Random small models of every family, as Hugging Face folders with a tokenizer.

Each shape has an awkward side: a vocabulary that tp does not divide, head_dim other than hidden/heads.
"""

from __future__ import annotations

import json
from pathlib import Path

SIZES = {
    "vocab_size": 301,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 9.0, 10.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
FAMILY_DEFAULTS = {
    "llama": {"tie_word_embeddings": True, "rope": LLAMA3_ROPE},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True, "vocab_size": 307},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 20},
    # the router's two softmaxes: over all experts (norm_topk_prob false), over the chosen ones (Mixtral)
    "qwen3_moe": {"head_dim": 20, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {
        "tie_word_embeddings": False,
        "hidden_size": 64,
        "scale": 0.2,
        "rope": LONGROPE,
        "original_max_position_embeddings": 64,
    },
    "olmo2": {"tie_word_embeddings": False, "vocab_size": 305},
    # windows shorter than the tests' sequences, caps that bite: scores and logits of random models are small
    "gemma2": {
        "head_dim": 20,
        "query_pre_attn_scalar": 24,
        "sliding_window": 7,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    # queries of 12 + 6, values of 14; a group of experts counts by its best two; YaRN with both its factors in use
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 28,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 6,
        "v_head_dim": 14,
        "rope": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.0,
        },
    },
}
# a second shape of each, the other way round: tied for untied, windows for none
OTHER_SHAPES = {
    "llama": {"tie_word_embeddings": False, "rope": None, "head_dim": 20},
    "mistral": {"tie_word_embeddings": True, "sliding_window": 7, "head_dim": None},
    "qwen2": {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3_moe": {"tie_word_embeddings": True, "norm_topk_prob": True, "vocab_size": 307},
    "mixtral": {"tie_word_embeddings": True, "sliding_window": 9, "head_dim": 20},
    "phi3": {"tie_word_embeddings": True, "sliding_window": 8, "rope": None, "vocab_size": 307, "hidden_size": 48},
    "olmo2": {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 20},
    "gemma2": {
        "scale": 0.15,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 20.0,
        "num_key_value_heads": 4,
        "layer_types": ("full_attention", "sliding_attention", "sliding_attention", "full_attention"),
    },
    # queries without a latent, any group of experts
    "deepseek_v3": {"q_lora_rank": None, "topk_group": 4, "tie_word_embeddings": True, "rope": None, "vocab_size": 307},
}
FAMILIES = tuple(FAMILY_DEFAULTS)
MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3")


def make_tiny_model(
    folder: Path, family: str, *, seed: int = 0, scale: float | None = None, boxes: bool = False, **changes
) -> Path:
    """Save a random `family` model in fp32. scale: standard deviation of its weights, the family's own or
    0.3 where it is not given; boxes: see `write_tokenizer`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {**SIZES, **FAMILY_DEFAULTS[family], **changes}
    own_scale = values.pop("scale", 0.3)
    scale = own_scale if scale is None else scale
    rope = values.pop("rope", None)
    if rope is not None:
        values |= rope_arguments(CONFIG_MAPPING[family], rope)
    config = CONFIG_MAPPING[family](**{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, scale)
            if "norm" in name:
                parameter.add_(1.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, scale)
    model.save_pretrained(folder)
    write_tokenizer(folder, values["vocab_size"], boxes=boxes)
    return folder


def rope_arguments(config_class, rope: dict) -> dict:
    """transformers 5 takes rope_parameters, transformers 4 rope_scaling."""
    if "rope_parameters" in config_class().to_dict():
        return {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    return {"rope_scaling": rope}


def write_tokenizer(folder: Path, vocab_size: int, *, boxes: bool = False) -> None:
    """A word-level tokenizer: ids 0 <unk>, 1 <s>, 2 </s>, then w3, w4, ...; with boxes ids 3 to 6 are
    \\boxed{0} to \\boxed{3}."""
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, vocab_size)]
    if boxes:
        words[3:7] = [f"\\boxed{{{i}}}" for i in range(4)]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": words[i],
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i in range(3)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "<unk>",
                "bos_token": "<s>",
                "eos_token": "</s>",
            }
        ),
        encoding="utf-8",
    )
