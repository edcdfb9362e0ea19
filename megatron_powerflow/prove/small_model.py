"""Which small model stands for the user's? A config.json with the same switches and the smallest sizes that the layout
can split.

Everything that decides the computation stays as the file has it: family, biases, norms, rotation, windows, caps, tied
embeddings, latent attention, the router. Widths, depth, vocabulary and counts shrink. Sizes are awkward where more is
seen so: a vocabulary that tp does not divide, a window shorter than the texts.

Left out: its weights, tokenizer and prompts (`small_files.py`). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_powerflow.architecture import Architecture, Experts
from megatron_powerflow.hf.family import Family
from megatron_powerflow.parallel.layout import Layout

VOCAB_SIZE = 307
WINDOW = 7  # tokens; texts have up to 32
STOP_TOKENS = tuple(range(2, 40))  # an eighth of the vocabulary: responses of uneven length
MOST_LAYERS_OF_CHUNK = 2
NOPE_DIM, ROPE_DIM = 12, 8  # of a query in latent attention
# names of the number of experts in the families' config.json
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def small_fields(
    fields: Mapping[str, Any], architecture: Architecture, family: Family, layout: Layout, small: Layout
) -> dict[str, Any]:
    """Return the fields of the small model's config.json.

    fields: those of the user's. architecture, layout: the user's. small: the layout that is to split the small model.
    """
    synonyms = family.synonyms
    changed = {synonyms.get(name, name): value for name, value in fields.items() if name != "dtype"}
    said = {**family.defaults, **changed}
    groups, heads = _heads(architecture, layout, small)
    head_dim = _head_dim(architecture, groups, small.tp)
    layers = _layers(small)
    square = architecture.hidden_size == architecture.query_width
    changed |= {
        "num_hidden_layers": layers,
        "hidden_size": heads * (head_dim if square else head_dim + 4),
        "intermediate_size": 24 * small.tp,
        "num_attention_heads": heads,
        "vocab_size": VOCAB_SIZE,
        "bos_token_id": 1,
        "eos_token_id": list(STOP_TOKENS),
        "pad_token_id": None,
        "torch_dtype": "float32",
    }
    if said.get("num_key_value_heads") is not None:
        changed["num_key_value_heads"] = groups
    if said.get("head_dim") is not None:
        changed["head_dim"] = head_dim
    if architecture.mla:
        changed |= _latent(changed, said, small.tp)
    if architecture.experts:
        changed |= _experts(architecture.experts, said, family, layers, small)
    return changed | _windows(architecture, said, layers) | _rotation(architecture, changed, head_dim)


def model_differences(architecture: Architecture, small: Architecture) -> list[str]:
    """Return what the small model has less of, for people, such as `hidden 4096 as 64`."""
    pairs = {
        "layers": (architecture.num_layers, small.num_layers),
        "hidden": (architecture.hidden_size, small.hidden_size),
        "MLP": (architecture.ffn_hidden_size, small.ffn_hidden_size),
        "heads": (architecture.num_attention_heads, small.num_attention_heads),
        "query groups": (architecture.num_query_groups, small.num_query_groups),
        "head_dim": (architecture.head_dim, small.head_dim),
        "vocabulary": (architecture.vocab_size, small.vocab_size),
    }
    if architecture.experts and small.experts:
        pairs["experts"] = (architecture.experts.num, small.experts.num)
        pairs["experts a token"] = (architecture.experts.per_token, small.experts.per_token)
    if architecture.sliding_window != small.sliding_window:
        pairs["window"] = (architecture.sliding_window or 0, small.sliding_window or 0)
    return [f"{name} {before} as {now}" for name, (before, now) in pairs.items() if before != now]


def _layers(small: Layout) -> int:
    """Return a number of layers that the chunks share evenly: two each, or one where there are many chunks.

    Where the layout's chunks are unequal, those that it names.
    """
    if small.layers is not None:
        return sum(small.layers)
    chunks = small.pp * small.num_chunks
    return chunks * (MOST_LAYERS_OF_CHUNK if chunks <= 2 else 1)


def _heads(architecture: Architecture, layout: Layout, small: Layout) -> tuple[int, int]:
    """Return (query groups, heads): several heads to a group, and several ranks to a group, where the user has so."""
    groups, tp = architecture.num_query_groups, small.tp
    if layout.tp > groups:
        return max(1, tp * groups // layout.tp), 2 * tp
    groups = tp * min(groups // layout.tp, 2)
    shared = architecture.num_attention_heads > architecture.num_query_groups
    return groups, groups * (2 if shared else 1)


def _head_dim(architecture: Architecture, groups: int, tp: int) -> int:
    """Return a size of a head of which an even number of dimensions is rotated, and that tp ranks of a group cut
    evenly."""
    if architecture.mla:
        return NOPE_DIM + ROPE_DIM
    ranks = max(tp // groups, 1)
    return next(
        size
        for size in range(16, 16 + 16 * ranks * 100)
        if (pairs := architecture.rope.rotated(size)) and pairs % 2 == 0 and 2 * size % ranks == 0
    )


def _latent(changed: Mapping[str, Any], said: Mapping[str, Any], tp: int) -> dict[str, Any]:
    """Return the sizes of latent attention, whose values are wider than what is not rotated, and whose latents tp
    divides."""
    sizes = {
        "qk_nope_head_dim": NOPE_DIM,
        "qk_rope_head_dim": ROPE_DIM,
        "v_head_dim": NOPE_DIM + 2,
        "kv_lora_rank": -(-28 // tp) * tp - ROPE_DIM,
        "q_lora_rank": None if said["q_lora_rank"] is None else 14 * tp,
    }
    heads = changed["num_attention_heads"]
    stated = {"qk_head_dim": NOPE_DIM + ROPE_DIM, "head_dim": ROPE_DIM, "num_key_value_heads": heads}
    return sizes | {name: value for name, value in stated.items() if changed.get(name) is not None}


def _experts(experts: Experts, said: Mapping[str, Any], family: Family, layers: int, small: Layout) -> dict[str, Any]:
    """Return the counts and sizes of a mixture: at least two experts a rank, and groups of experts where tokens choose
    among groups."""
    grouped = experts.num_groups > 1
    num = 2 * small.ep * (2 if grouped or small.ep == 1 else 1)
    num = max(num, 8 if grouped else 4)
    # Megatron ranks a group by its best two: 4 of 2 of the 4 groups
    per_token = 4 if grouped else min(experts.per_token, 2)
    sizes: dict[str, Any] = {name: num for name in EXPERT_COUNTS if name in family.sizes}
    sizes |= {"num_experts_per_tok": per_token}
    wanted = {
        "moe_intermediate_size": 16 * small.tp,
        "n_group": 4 if grouped else 1,
        "topk_group": 2 if grouped else 1,
        "n_shared_experts": min(said.get("n_shared_experts") or 0, 2),
        "first_k_dense_replace": min(said.get("first_k_dense_replace") or 0, 1, layers - 1),
    }
    return sizes | {name: value for name, value in wanted.items() if name in said}


def _windows(architecture: Architecture, said: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Return the fields of a sliding window, so that both kinds of layers are there where the user has both."""
    changed: dict[str, Any] = {}
    if architecture.sliding_window is not None:
        changed["sliding_window"] = WINDOW
    if (kinds := said.get("layer_types")) is not None:
        changed["layer_types"] = _spread(kinds, layers)
    if "max_window_layers" in said:
        windowed = architecture.windowed_layers
        everywhere = architecture.sliding_window is not None and windowed is None
        changed["max_window_layers"] = 0 if everywhere else layers // 2 if windowed else layers
    return changed


def _evenly(values: Sequence[Any], count: int) -> list[Any]:
    """Return so many of a list's values, in their order, from its whole length."""
    return [values[place * len(values) // count] for place in range(count)]


def _spread(kinds: Sequence[str], count: int) -> list[str]:
    """Return the kinds of so many layers, evenly from the whole model, each kind at least once."""
    chosen = _evenly(kinds, count)
    missing = [kind for kind in dict.fromkeys(kinds) if kind not in chosen]
    return chosen[: count - len(missing)] + missing


def _rotation(architecture: Architecture, fields: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Return the rotation with as many factors as the small heads have rotated pairs; only longrope has factors."""
    if architecture.rope.scaling != "longrope":
        return {}
    pairs = architecture.rope.rotated(head_dim) // 2
    return {
        name: {
            key: _evenly(value, pairs) if key in ("short_factor", "long_factor") else value
            for key, value in fields[name].items()
        }
        for name in ("rope_scaling", "rope_parameters")
        if fields.get(name)
    }
