"""Which computation does a Hugging Face folder ask for? Its config.json read into an `Architecture`.

The JSON itself is read, not a transformers config object: what the file says is what is checked, no code
of the folder runs, and no import of torch is needed. A setting that changes the computation and is not
mapped is refused by name. There are three kinds of fields (`config_fields.py`). Those that some architecture
computes with are mapped or refused by every family. Those that only describe, or act in training or generation
only, are passed over. Unknown ones are named in a warning: transformers ignores them too, and folders carry notes
of their own (SmolLM2's released file says is_llama_config), but one of them may be a newer transformers' switch.

Left out: the tensors (`files.py`), their layout (`operations.py`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_powerflow.architecture import Architecture, Experts, Rope
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config_fields import BOOKKEEPING, COMPUTING, READ
from megatron_powerflow.hf.config_kinds import is_number, wrong_kinds
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.rope import read_rope
from megatron_powerflow.whole_files import ordinary


class ModelDescription(NamedTuple):
    """The architecture that a config.json asks for, and the family by which it was read."""

    architecture: Architecture
    family: Family


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read the JSON object that a file holds. what: the file's role, for the message.

    Raises UserError, which names the file, when it is missing, cannot be read or holds no JSON object.
    """
    try:
        value = json.loads(ordinary(path).read_text(encoding="utf-8-sig"), object_pairs_hook=_without_contradictions)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what} is needed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} must be a JSON object, got {type(value).__name__}")
    return value


def _without_contradictions(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs. Raises ValueError when a field has two values, where Python would take the
    last one."""
    fields: dict[str, Any] = {}
    for key, value in pairs:
        first = fields.setdefault(key, value)
        if first is not value and first != value:  # NaN differs from itself
            raise ValueError(f"{key} is there twice, as {first!r} and as {value!r}; take one away")
    return fields


def read_architecture(folder: str | Path, families: Mapping[str, Family]) -> ModelDescription:
    """Read `folder/config.json` into an architecture, by the family that its model_type names.

    families: model_type -> family. Raises UserError with every setting that cannot be mapped; warns of unknown fields.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"model.hf_path={str(folder)!r}: no such folder; give a local Hugging Face folder, or "
            "OWNER/NAME of one on the hub"
        )
    raw = read_json(folder / "config.json", "the model's config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in families:
        raise UserError(
            f"{folder / 'config.json'}: model_type={model_type!r} is not supported; supported: {', '.join(families)}"
        )
    try:
        return _mapped(folder, raw, families[model_type])
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, ZeroDivisionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{folder / 'config.json'}: a value is not of its field's kind ({reason}); copy the file from its source"
        ) from None


def _mapped(folder: Path, raw: Mapping[str, Any], family: Family) -> ModelDescription:
    """Map the fields of a config.json by its family. A value of the wrong kind may raise any of Python's errors, which
    the caller turns into a UserError."""
    model_type = family.model_type
    kinds = wrong_kinds(raw, family.nullable)
    raw, violations = _one_name_each(raw, {"torch_dtype": "dtype", **family.synonyms})
    fields = {**family.defaults, **raw}  # a null in the file stays null: for Mistral it means "no window"
    mapped = {*family.defaults, *family.reads, *family.sizes}
    must_be = {key: value for key, value in COMPUTING.items() if key not in mapped} | dict(family.must_be)
    violations += [
        f"{key}={fields[key]!r} is not supported for {model_type}; only {value!r} is"
        for key, value in must_be.items()
        if (fields.get(key, value) or None) != (value or None)
    ]
    _mention_unknown_fields(raw, mapped | must_be.keys(), folder / "config.json")
    if fields.get("quantization_config") is not None:
        violations.append("the weights are quantized (quantization_config); give the folder of the unquantized model")
    missing = [key for key in (*_REQUIRED, *family.sizes) if type(fields.get(key)) is not int or fields[key] < 1]
    spelled = {name: f"{name} (or {other})" for other, name in family.synonyms.items()}
    violations += [f"{spelled.get(key, key)} is missing or not a whole number above 0" for key in missing]
    violations += kinds
    if "num_hidden_layers" not in missing and fields["num_hidden_layers"] > MOST_LAYERS:  # before lists are that long
        violations.append(f"num_hidden_layers={fields['num_hidden_layers']}; no model has over {MOST_LAYERS}")
    elif not missing and not kinds:
        rope, rope_violations = read_rope(raw, fields, family)
        violations += [*rope_violations, *_value_violations(fields), *family.violations(fields)]
    if violations:
        raise UserError([f"{folder / 'config.json'}: {violation}" for violation in violations])
    architecture = _architecture(fields, family, rope, folder / "config.json")
    violations = _size_violations(architecture) + _expert_violations(architecture.experts)
    violations += _attention_violations(architecture, fields.get("layer_types"))
    if violations:
        raise UserError([f"{folder / 'config.json'}: {violation}" for violation in violations])
    return ModelDescription(architecture, family)


def _one_name_each(raw: Mapping[str, Any], synonyms: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return (the fields under the names that this module reads, a violation for each field to which two names give
    different values)."""
    fields, violations = dict(raw), []
    for other, name in synonyms.items():
        if other not in fields:
            continue
        value = fields.pop(other)
        if fields.setdefault(name, value) != value:
            violations.append(
                f"{other}={value!r} stands beside {name}={fields[name]!r}, another name of it; take away what is not "
                "the model's"
            )
    return fields, violations


def _value_violations(fields: Mapping[str, Any]) -> list[str]:
    """Name what is wrong with the numbers that every family has. Their kinds have been checked before."""
    violations = []
    heads, vocab_size, groups = fields["num_attention_heads"], fields["vocab_size"], fields.get("num_key_value_heads")
    if groups is not None and (groups < 1 or heads % groups):
        violations.append(f"num_key_value_heads={groups}; it must divide num_attention_heads={heads}")
    if (head_dim := fields.get("head_dim")) is not None and head_dim < 1:
        violations.append(f"head_dim={head_dim}; it must be at least 1")
    if not is_number(fields["rms_norm_eps"]) or fields["rms_norm_eps"] >= 1:
        violations.append(f"rms_norm_eps={fields['rms_norm_eps']!r}; it must be at least 0.0 and below 1.0")
    if not 0 <= fields.get("initializer_range", 0.0) <= 1:
        violations.append(f"initializer_range={fields['initializer_range']!r}; it must be from 0.0 to 1.0")
    if (pad := fields.get("pad_token_id")) is not None and not -vocab_size <= pad < vocab_size:
        violations.append(f"pad_token_id={pad} is none of the model's {vocab_size} tokens; mend it or say null")
    return violations


def _mention_unknown_fields(raw: Mapping[str, Any], known: set[str], path: Path) -> None:
    """Warn of the fields that are switched on and that neither the family nor this module knows."""
    unknown = [
        key
        for key, value in raw.items()
        if value and key not in known | READ | BOOKKEEPING and not key.startswith("_")  # false, null, 0: off
    ]
    if unknown:
        warnings.warn(
            f"{path}: fields unknown to this program change nothing here: "
            + ", ".join(f"{key}={raw[key]!r}" for key in unknown)
            + "; if the model computes with one of them, its numbers are not the model's",
            UserWarning,
            stacklevel=3,
        )


MOST_LAYERS = MOST_EXPERTS = 10_000
MOST_WEIGHTS = 10**14
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _architecture(fields: Mapping[str, Any], family: Family, rope: Rope, path: Path) -> Architecture:
    """Build the architecture: the common reading of the fields, and over it what the family reads differently."""
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    overrides = family.overrides(fields)
    head_dim = overrides.get("head_dim") or fields.get("head_dim")
    if head_dim is None and hidden % heads:
        raise UserError(f"{path}: hidden_size={hidden} is no multiple of num_attention_heads={heads}, and no head_dim")
    common = {
        "family": family.model_type,
        "num_layers": fields["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": fields["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": fields.get("num_key_value_heads") or heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": fields["vocab_size"],
        "norm_epsilon": float(fields["rms_norm_eps"]),
        "rope": rope,
        "tied_embeddings": bool(fields["tie_word_embeddings"]),
        "qkv_bias": False,
        "qk_norm": False,
        "max_positions": _max_positions(fields["max_position_embeddings"], rope),
        "sliding_window": None,
    }
    return Architecture(**{**common, **overrides})


def _max_positions(stated: int, rope: Rope) -> int:
    """Return the longest sequence, in tokens. stated: max_position_embeddings.

    longrope ends at its original length. YaRN reaches factor times its original length, also where the file states the
    original one alone, as it does by Qwen's instructions; vLLM takes it so too.
    """
    if rope.scaling == "longrope":
        return min(stated, rope.original_max_positions)
    if rope.scaling == "yarn":
        return max(stated, int(rope.factor * rope.original_max_positions))
    return stated


def _size_violations(a: Architecture) -> list[str]:
    """Name sizes at which nothing can be counted any more, let alone trained."""
    experts = a.experts.num if a.experts else 1
    if experts > MOST_EXPERTS:
        return [f"{experts} experts; no model has over {MOST_EXPERTS}"]
    width = 2 * (a.query_width + a.key_width) + 3 * experts * a.ffn_hidden_size
    weights = a.hidden_size * (a.num_layers * width + 2 * a.vocab_size)
    return [f"about {weights:.1e} weights; no model has over {MOST_WEIGHTS:.0e}"] if weights > MOST_WEIGHTS else []


def _expert_violations(experts: Experts | None) -> list[str]:
    if experts is None:
        return []
    if not 1 <= experts.per_token <= experts.num:
        return [f"num_experts_per_tok={experts.per_token} of {experts.num} experts; it must be 1 to {experts.num}"]
    if experts.normalized and experts.per_token == 1:
        return ["num_experts_per_tok=1 with normalized router weights is not supported: every weight is 1"]
    return []


def _attention_violations(architecture: Architecture, layer_types: Any) -> list[str]:
    """Name what is wrong with rotation, window, softcaps and layer_types (as the file says it, or None)."""
    violations, window, rope = [], architecture.sliding_window, architecture.rope
    rotated_dim = architecture.mla.rope_head_dim if architecture.mla else architecture.head_dim
    pairs = rope.rotated(rotated_dim) // 2
    if rope.rotated(rotated_dim) % 2 or not pairs:
        violations.append(
            f"head_dim={rotated_dim} with partial_rotary_factor={rope.fraction} rotates {rope.rotated(rotated_dim)} "
            "dimensions; it must be an even number of them"
        )
    if rope.scaling == "longrope" and len(rope.factors) != pairs:
        violations.append(
            f"longrope's short_factor has {len(rope.factors)} numbers; head_dim={rotated_dim} with num_attention_heads="
            f"{architecture.num_attention_heads} needs {pairs}"
        )
    if window is not None and window < 1:
        violations.append(f"sliding_window={window!r}; it must be a whole number of tokens, at least 1, or null")
    for name, cap in (
        ("attn_logit_softcapping", architecture.attention_softcap),
        ("final_logit_softcapping", architecture.logit_softcap),
    ):
        if cap is not None and not is_number(cap, above=0.0):
            violations.append(f"{name}={cap!r}; it must be a number above 0, or null")
    layers = architecture.windowed_layers or (window is not None,) * architecture.num_layers
    computed = ["sliding_attention" if windowed else "full_attention" for windowed in layers]
    if layer_types is not None and len(layer_types) != len(computed):
        violations.append(
            f"layer_types has {len(layer_types)} entries, num_hidden_layers={len(computed)} asks for as many"
        )
    elif layer_types is not None and list(layer_types) != computed:
        violations.append(
            f"layer_types={list(layer_types)} is not supported for {architecture.family} with "
            f"sliding_window={window!r}; only {computed} is"
        )
    return violations


def windows_by_layer(window: int | None, layer_types: Any, default: Sequence[bool]) -> dict[str, Any]:
    """Return the Architecture fields of a sliding window that only some layers have.

    layer_types: what the file says, or None; default: per layer, whether it has the window where the file is silent.
    Nothing is checked: `read_architecture` compares layer_types with the result.
    """
    layers = tuple(default) if layer_types is None else tuple(kind == "sliding_attention" for kind in layer_types)
    if window is None or not any(layers):
        return {}
    return {"sliding_window": window, "windowed_layers": None if all(layers) else layers}


def read_stop_token_ids(folder: str | Path, tokenizer_eos: int | None, vocab_size: int) -> frozenset[int]:
    """Return the token ids that end a response: all that generation_config.json, config.json and the tokenizer name.

    Instruct models spread theirs over all three. vLLM stops at the same ones, apart from those of config.json, which it
    reads only where there is no generation_config.json.

    Raises UserError when none is named, so that no response could ever end, or when one is not of the vocabulary.
    """
    folder = Path(folder)
    named = {name: _eos_in(folder / name) for name in ("generation_config.json", "config.json")}
    named["the tokenizer"] = [] if tokenizer_eos is None else [tokenizer_eos]
    violations = [
        f"{folder}: {name} says eos_token_id={token!r}, which is none of the model's {vocab_size} tokens; "
        "mend it, or name the right ones in rollout.stop_token_ids"
        for name, tokens in named.items()
        for token in tokens
        if type(token) is not int or not 0 <= token < vocab_size
    ]
    if violations:
        raise UserError(violations)
    stop_token_ids = frozenset(token for tokens in named.values() for token in tokens)
    if not stop_token_ids:
        raise UserError(
            f"{folder}: neither config.json, generation_config.json nor the tokenizer names an eos token; name it in "
            "rollout.stop_token_ids"
        )
    return stop_token_ids


def _eos_in(path: Path) -> list[Any]:
    """List what a JSON file says of eos_token_id, unchecked; empty where there is no file or no such field."""
    if not path.is_file():
        return []
    value = read_json(path, path.name).get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]
