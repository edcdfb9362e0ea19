"""Which computation does a Hugging Face folder ask for? Its config.json read into an `Architecture`.

The JSON itself is read, not a transformers config object: what the file says is what is checked, no code
of the folder runs, and no import of torch is needed. A setting that changes the computation and is not
mapped is refused by name. There are three kinds of fields (`config_fields.py`): those that some architecture
computes with, which every family maps or refuses; those that describe, or act in training or generation only,
which are passed over; and unknown ones, which are named in a warning: transformers ignores them too, and folders
carry notes of their own (SmolLM2's released file says is_llama_config), but one may be a newer transformers' switch.

Left out: the tensors (`hf_files.py`) and their layout (`ops.py`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_powerflow.conversion.config_fields import BOOKKEEPING, COMPUTING, READ
from megatron_powerflow.conversion.ops import Op
from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Architecture, Experts, Rope


@dataclass(frozen=True)
class Family:
    """One model family as data; `families/<name>.py` holds one each.

    model_type: the `model_type` of config.json; chosen by equality, never by a part of a name.
    defaults: what transformers assumes where the file is silent.
    must_be: field -> the one value we compute; any other value is refused by name (null, false, 0 and [] are one).
    overrides: (fields of the file) -> Architecture fields that differ from the common reading.
    ops: one list, two directions: tensors of a layer, and those outside the layers.
    sizes: fields that must be whole numbers beside the common ones.
    reads: fields that `overrides` maps, or that do nothing in this family whatever they say.
    partial_rotary: partial_rotary_factor counts here; elsewhere only 1.0 is accepted.
    rope_types: ways of stretching rotation that we compute for it.
    violations: what else of the fields, all of them there, cannot be computed.
    """

    model_type: str
    defaults: Mapping[str, Any]
    must_be: Mapping[str, Any]
    overrides: Callable[[Mapping[str, Any]], dict[str, Any]]
    layer_ops: tuple[Op, ...]
    model_ops: tuple[Op, ...]
    sizes: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    partial_rotary: bool = False
    rope_types: tuple[str, ...] = ("default", "linear", "llama3")
    violations: Callable[[Mapping[str, Any]], list[str]] = lambda fields: []


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {what} is needed") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {what} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} must be a JSON object, got {type(value).__name__}")
    return value


def read_architecture(folder: str | Path, families: Mapping[str, Family]) -> tuple[Architecture, Family]:
    """Read `folder/config.json`. Raises UserError with every setting that cannot be mapped."""
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


def _mapped(folder: Path, raw: Mapping[str, Any], family: Family) -> tuple[Architecture, Family]:
    """Values of the wrong kind raise whatever they raise."""
    model_type = family.model_type
    fields = {**family.defaults, **raw}  # a null in the file stays null: for Mistral it means "no window"
    mapped = {*family.defaults, *family.reads, *family.sizes}
    must_be = {key: value for key, value in COMPUTING.items() if key not in mapped} | dict(family.must_be)
    violations = [
        f"{folder / 'config.json'}: {key}={fields[key]!r} is not supported for {model_type}; only {value!r} is"
        for key, value in must_be.items()
        if (fields.get(key, value) or None) != (value or None)
    ]
    _mention_unknown_fields(raw, mapped | must_be.keys(), folder / "config.json")
    if fields.get("quantization_config"):
        violations.append(
            f"{folder / 'config.json'}: the weights are quantized (quantization_config); "
            "give the folder of the unquantized model"
        )
    if not isinstance(fields.get("layer_types"), list | None):
        violations.append(f"{folder / 'config.json'}: layer_types={fields['layer_types']!r} is not a list")
    missing = [key for key in (*_REQUIRED, *family.sizes) if type(fields.get(key)) is not int or fields[key] < 1]
    violations += [f"{folder / 'config.json'}: {key} is missing or not a whole number above 0" for key in missing]
    violations += [f"{folder / 'config.json'}: {text}" for text in _rope_said_twice(raw)]
    rope = _read_rope(fields, family, folder / "config.json", violations)
    if "num_hidden_layers" not in missing and fields["num_hidden_layers"] > MOST_LAYERS:  # before lists are that long
        number = fields["num_hidden_layers"]
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers={number}; no model has over {MOST_LAYERS}")
    if not missing:
        violations += [f"{folder / 'config.json'}: {violation}" for violation in family.violations(fields)]
    if violations:
        raise UserError(violations)
    architecture = _architecture(fields, family, rope, folder / "config.json")
    found = _expert_violations(architecture.experts) + _attention_violations(architecture, fields.get("layer_types"))
    if found:
        raise UserError([f"{folder / 'config.json'}: {violation}" for violation in found])
    return architecture, family


def _mention_unknown_fields(raw: Mapping[str, Any], known: set[str], path: Path) -> None:
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


MOST_LAYERS = 10_000
_REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)


def _architecture(fields: Mapping[str, Any], family: Family, rope: Rope, path: Path) -> Architecture:
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    own = family.overrides(fields)
    head_dim = own.get("head_dim") or fields.get("head_dim")
    if head_dim is None and hidden % heads:
        raise UserError(f"{path}: hidden_size={hidden} is no multiple of num_attention_heads={heads}, and no head_dim")
    limit = rope.original_max_positions if rope.scaling == "longrope" else fields["max_position_embeddings"]
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
        "max_positions": min(fields["max_position_embeddings"], limit),
        "sliding_window": None,
    }
    return Architecture(**{**common, **own})


def _expert_violations(experts: Experts | None) -> list[str]:
    if experts is None:
        return []
    if not isinstance(experts.num, int) or not 1 <= experts.per_token <= experts.num:
        return [f"num_experts_per_tok={experts.per_token} of {experts.num} experts; it must be 1 to {experts.num}"]
    if experts.normalized and experts.per_token == 1:
        return ["num_experts_per_tok=1 with normalized router weights is not supported: every weight is 1"]
    return []


def _attention_violations(architecture: Architecture, layer_types: Any) -> list[str]:
    found, window, rope = [], architecture.sliding_window, architecture.rope
    pairs = rope.rotated(architecture.head_dim) // 2
    if rope.scaling == "longrope" and len(rope.factors) != pairs:
        found.append(f"longrope's short_factor has {len(rope.factors)} numbers; {pairs} are needed")
    if window is not None and (not isinstance(window, int) or window < 1):
        found.append(f"sliding_window={window!r}; it must be a whole number of tokens, at least 1, or null")
    for field, cap in (
        ("attn_logit_softcapping", architecture.attention_softcap),
        ("final_logit_softcapping", architecture.logit_softcap),
    ):
        if cap is not None and (not isinstance(cap, int | float) or cap <= 0):
            found.append(f"{field}={cap!r}; it must be a number above 0, or null")
    layers = architecture.windowed_layers or (window is not None,) * architecture.num_layers
    computed = ["sliding_attention" if here else "full_attention" for here in layers]
    if layer_types is not None and len(layer_types) != len(computed):
        found.append(f"layer_types has {len(layer_types)} entries, num_hidden_layers={len(computed)} asks for as many")
    elif layer_types is not None and list(layer_types) != computed:
        found.append(
            f"layer_types={list(layer_types)} is not supported for {architecture.family} with "
            f"sliding_window={window!r}; only {computed} is"
        )
    return found


def windows_by_layer(window: int | None, layer_types: Any, default: Sequence[bool]) -> dict[str, Any]:
    """Architecture fields of a sliding window that only some layers have. layer_types: what the file says, or None;
    default: which layers have the window where it is silent. What it says wrongly is found by `read_architecture`."""
    layers = tuple(default) if layer_types is None else tuple(kind == "sliding_attention" for kind in layer_types)
    if window is None or not any(layers):
        return {}
    return {"sliding_window": window, "windowed_layers": None if all(layers) else layers}


def _rope_said_twice(raw: Mapping[str, Any]) -> list[str]:
    """What the file says of the rotation in two places, and differently."""
    places = {name: raw[name] for name in ("rope_parameters", "rope_scaling") if isinstance(raw.get(name), dict)}
    found = []
    if len(places) == 2:
        new, old = ({**place, "rope_type": _rope_type(place)} for place in places.values())
        differ = [key for key in sorted(new.keys() & old.keys()) if new[key] != old[key]]
        only = [key for key in sorted(old.keys() ^ new.keys()) if key not in ("type", "rope_theta")]
        if differ or only:
            found.append(f"rope_parameters and rope_scaling differ in {', '.join(differ + only)}")
    for name, place in places.items():
        if place.get("type", place.get("rope_type")) != place.get("rope_type", place.get("type")):
            found.append(f"{name} has type={place['type']!r} and rope_type={place['rope_type']!r}")
        for key in ("rope_theta", "partial_rotary_factor"):
            if None not in (raw.get(key), place.get(key)) and raw[key] != place[key]:
                found.append(f"{key}={raw[key]!r} stands beside {name}.{key}={place[key]!r}")
    return [f"{text}; take away what the model was not trained with" for text in found]


def _rope_type(scaling: Mapping[str, Any]) -> str:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return "longrope" if kind == "su" else kind  # its name in the first Phi-3


def _read_rope(fields: Mapping[str, Any], family: Family, path: Path, violations: list[str]) -> Rope:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 one rope_parameters; both are read."""
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or fields.get("rope_theta") or 10000.0)
    kind = _rope_type(scaling)
    fraction = float(fields.get("partial_rotary_factor") or scaling.get("partial_rotary_factor") or 1.0)
    if fraction != 1.0 and not family.partial_rotary:
        violations.append(f"{path}: partial_rotary_factor is not supported for {family.model_type}; only 1.0 is")
    if kind not in family.rope_types:
        violations.append(
            f"{path}: rope scaling type {kind!r} is not supported for {family.model_type}; supported: "
            + ", ".join(family.rope_types)
        )
        return Rope(theta)
    if kind == "default":
        return Rope(theta, fraction=fraction)
    if kind == "linear":
        return Rope(theta, "linear", float(scaling["factor"]))
    if kind == "longrope":
        return _longrope(scaling, fields, theta, fraction, path, violations)
    if kind == "yarn":
        return _read_yarn(theta, scaling, path, violations)
    assert kind == "llama3", kind
    return Rope(
        theta,
        "llama3",
        float(scaling["factor"]),
        float(scaling["low_freq_factor"]),
        float(scaling["high_freq_factor"]),
        int(scaling["original_max_position_embeddings"]),
    )


def _read_yarn(theta: float, scaling: Mapping[str, Any], path: Path, violations: list[str]) -> Rope:
    if scaling.get("truncate") is False:
        violations.append(f"{path}: truncate=False of rope scaling type 'yarn' is not supported; only True is")
    missing = [key for key in ("factor", "original_max_position_embeddings") if not scaling.get(key)]
    if missing:
        violations.append(f"{path}: rope scaling type 'yarn' without {' and '.join(missing)}")
        return Rope(theta)
    factor, mscale, mscale_all_dim = float(scaling["factor"]), scaling.get("mscale"), scaling.get("mscale_all_dim")

    def concentration(mscale: float) -> float:  # the temperature of YaRN, arXiv 2309.00071, as DeepSeek weighs it
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None and mscale and mscale_all_dim:
        attention_factor = concentration(mscale) / concentration(mscale_all_dim)
    elif attention_factor is None:
        attention_factor = concentration(1.0)
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_positions=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        attention_factor=float(attention_factor),
        mscale_all_dim=float(mscale_all_dim or 0.0),
    )


def _longrope(scaling, fields, theta: float, fraction: float, path: Path, violations: list[str]) -> Rope:
    """Of sequences up to original_max_position_embeddings: the short factors. Beyond, other factors hold for the whole
    sequence, so that its first tokens would change with its length: there the model ends for us."""
    limit = fields["original_max_position_embeddings"]  # goes before the one in the scaling
    factors, stretch = scaling.get("short_factor"), scaling.get("factor")
    if not isinstance(limit, int) or not isinstance(factors, list):
        violations.append(f"{path}: longrope needs short_factor, a list, and original_max_position_embeddings")
        return Rope(theta)
    if (other := scaling.get("original_max_position_embeddings", limit)) != limit:
        violations.append(f"{path}: original_max_position_embeddings is {limit}, and {other} in the rope scaling")
    longest = fields["max_position_embeddings"] / limit
    if stretch is not None and stretch != longest:
        violations.append(
            f"{path}: longrope with factor={stretch} is not supported; only max_position_embeddings / "
            f"original_max_position_embeddings = {longest} is"
        )
    default = math.sqrt(1 + math.log(longest) / math.log(limit)) if longest > 1 else 1.0
    return Rope(
        theta,
        "longrope",
        original_max_positions=limit,
        factors=tuple(map(float, factors)),
        attention_factor=float(scaling.get("attention_factor") or default),
        fraction=fraction,
    )


def read_stop_token_ids(folder: str | Path, tokenizer_eos: int | None, vocab_size: int) -> frozenset[int]:
    """Token ids that end a response: the union of what generation_config.json, config.json and the tokenizer name, as
    instruct models spread theirs over all three. vLLM stops at the same ones, apart from config.json's, which it reads
    where there is no generation_config.json.

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
    found = frozenset(token for tokens in named.values() for token in tokens)
    if not found:
        raise UserError(
            f"{folder}: neither config.json, generation_config.json nor the tokenizer names an eos token; name it in "
            "rollout.stop_token_ids"
        )
    return found


def _eos_in(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    value = read_json(path, path.name).get("eos_token_id")
    return value if isinstance(value, list) else [] if value is None else [value]
