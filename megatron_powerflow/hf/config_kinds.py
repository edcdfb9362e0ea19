"""Is each value of a config.json of the kind that its field takes?

The kinds are those that transformers 5 demands. A file that transformers does not load is refused here as well, because
a trained policy is exported with the same file.

Left out: what the values mean (`config.py`, `rope.py` and `families/`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

FLAG, WHOLE, DECIMAL = "true or false", "a whole number", "a number with a decimal point"
NUMBER, TEXT, OBJECT, LIST = "a number", "text", "an object", "a list"
DTYPE = "float32, bfloat16 or float16"

FITS: dict[str, Callable[[Any], bool]] = {
    FLAG: lambda value: isinstance(value, bool),
    WHOLE: lambda value: type(value) is int,  # Python counts true and false as whole numbers
    DECIMAL: lambda value: type(value) is float,
    NUMBER: lambda value: type(value) in (int, float),
    TEXT: lambda value: isinstance(value, str),
    OBJECT: lambda value: isinstance(value, dict),
    LIST: lambda value: isinstance(value, list),
    DTYPE: lambda value: value in ("float32", "bfloat16", "float16"),
}
# Sizes that a family needs are not here: `read_architecture` demands them, above 0.
KINDS = {
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "tie_word_embeddings": FLAG,
    "use_sliding_window": FLAG,
    "use_bidirectional_attention": FLAG,
    "is_causal": FLAG,
    "norm_topk_prob": FLAG,
    "rope_interleave": FLAG,
    "use_cache": FLAG,
    "output_router_logits": FLAG,
    "output_hidden_states": FLAG,
    "head_dim": WHOLE,
    "num_key_value_heads": WHOLE,
    "original_max_position_embeddings": WHOLE,
    "sliding_window": WHOLE,
    "max_window_layers": WHOLE,
    "first_k_dense_replace": WHOLE,
    "q_lora_rank": WHOLE,
    "decoder_sparse_step": WHOLE,
    "num_nextn_predict_layers": WHOLE,
    "pretraining_tp": WHOLE,
    "pad_token_id": WHOLE,
    "bos_token_id": WHOLE,
    "rms_norm_eps": DECIMAL,
    "initializer_range": DECIMAL,
    "attn_logit_softcapping": DECIMAL,
    "final_logit_softcapping": DECIMAL,
    "routed_scaling_factor": DECIMAL,
    "router_aux_loss_coef": DECIMAL,
    "router_jitter_noise": DECIMAL,
    "attention_dropout": NUMBER,
    "resid_pdrop": NUMBER,
    "embd_pdrop": NUMBER,
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "id2label": OBJECT,
    "label2id": OBJECT,
    "layer_types": LIST,
    "mlp_only_layers": LIST,
    "configuration_files": LIST,
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
}
# These fields may be null in every family; `Family.nullable` names those that may be null in one.
NULLABLE = frozenset(
    {
        "use_bidirectional_attention",
        "output_hidden_states",
        "sliding_window",
        "q_lora_rank",
        "pretraining_tp",
        "pad_token_id",
        "bos_token_id",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "rope_parameters",
        "rope_scaling",
        "id2label",
        "label2id",
        "layer_types",
        "mlp_only_layers",
        "dtype",
        "torch_dtype",
    }
)


def wrong_kinds(raw: Mapping[str, Any], nullable: Collection[str]) -> list[str]:
    """Return a sentence for each field whose value is not of the field's kind.

    nullable: the fields that may be null in this family, beside those of NULLABLE.
    """
    return [
        f"{key}={raw[key]!r}; it must be {kind}" + (" or null" if key in NULLABLE or key in nullable else "")
        for key, kind in KINDS.items()
        if key in raw and not FITS[kind](raw[key]) and not (raw[key] is None and (key in NULLABLE or key in nullable))
    ]


def is_number(value: Any, *, least: float = 0.0, above: float | None = None) -> bool:
    """Tell whether a value is a number below 1e30 and at least `least`, or, where `above` is given, above that."""
    return type(value) in (int, float) and (value >= least if above is None else value > above) and value < 1e30
