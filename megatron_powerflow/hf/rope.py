"""Which rotation does a config.json ask for? Its fields, in the words of transformers 4 and 5, read into a `Rope`.

transformers 4 writes rope_theta and rope_scaling, transformers 5 one rope_parameters. A file may have several of them,
and transformers takes one and passes the others over: here they must agree.

Left out: the frequencies (`model/rotary.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_powerflow.architecture import Rope
from megatron_powerflow.hf.config_kinds import is_number
from megatron_powerflow.hf.family import Family

DEFAULT_THETA = 10_000.0
ORIGINAL = "original_max_position_embeddings"
# Way of stretching -> numbers that it needs, and those that it may have. All are above 0.
NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow"), "longrope": ("attention_factor", "factor")}


def read_rope(raw: Mapping[str, Any], fields: Mapping[str, Any], family: Family) -> tuple[Rope, list[str]]:
    """The rotation, and a sentence for everything that cannot be read; with one, the rotation is any.

    raw: what the file says; fields: the same over the family's defaults. rope_parameters and rope_scaling are objects
    or null.
    """
    places: dict[str, Mapping[str, Any]] = {
        name: fields[name] for name in ("rope_scaling", "rope_parameters") if fields.get(name)
    }
    found = _said_twice(places, raw, fields)
    place, scaling = next(iter(places.items()), ("rope_parameters", {}))
    if layers := [key for key, value in scaling.items() if isinstance(value, dict)]:
        found.append(f"{place} has parts for {', '.join(layers)}; only one rotation for all layers is supported")
        return Rope(DEFAULT_THETA), found
    theta = scaling.get("rope_theta", fields.get("rope_theta", DEFAULT_THETA))
    if not is_number(theta, above=1.0):
        found.append(f"rope_theta={theta!r}; it must be a number above 1")
    fraction = scaling.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if not is_number(fraction, above=0.0) or fraction > 1.0:
        found.append(f"partial_rotary_factor={fraction!r}; it must be a number above 0, at most 1.0")
    elif fraction != 1.0 and not family.partial_rotary:
        found.append(f"partial_rotary_factor={fraction!r} is not supported for {family.model_type}; only 1.0 is")
    kind = _rope_type(scaling)
    if kind not in family.rope_types:
        known = ", ".join(family.rope_types)
        found.append(
            f"{place}: rope scaling type {kind!r} is not supported for {family.model_type}; supported: {known}"
        )
        return Rope(DEFAULT_THETA), found
    found += [
        f"{place}.{key}={scaling.get(key)!r}; rope scaling type {kind!r} needs a number above 0"
        for key in (*NEEDED.get(kind, ()), *OPTIONAL.get(kind, ()))
        if not is_number(scaling.get(key), above=0.0)
        and not (key in OPTIONAL.get(kind, ()) and scaling.get(key) is None)
    ]
    if kind in ("llama3", "yarn", "longrope"):
        found += _original_violations(place, scaling, fields)
    if kind == "longrope":
        found += _longrope_violations(scaling)
    elif kind == "yarn":
        found += _yarn_violations(place, scaling)
    elif kind == "llama3" and not found and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        found.append(f"{place}.low_freq_factor={scaling['low_freq_factor']!r} is not below high_freq_factor")
    if found:
        return Rope(DEFAULT_THETA), found
    if kind == "longrope":
        return _longrope(scaling, fields, float(theta), float(fraction))
    return _stretched(kind, scaling, fields, float(theta), float(fraction)), found


def _said_twice(
    places: Mapping[str, Mapping[str, Any]], raw: Mapping[str, Any], fields: Mapping[str, Any]
) -> list[str]:
    """What the file says of the rotation in two places, and differently."""
    found = []
    if len(places) == 2:
        outside = {"rope_theta": fields.get("rope_theta", DEFAULT_THETA)}
        one, other = ({**outside, **place, "rope_type": _rope_type(place), "type": None} for place in places.values())
        if differ := [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]:
            found.append(f"rope_parameters and rope_scaling differ in {', '.join(differ)}")
    for name, place in places.items():
        if place.get("type", place.get("rope_type")) != place.get("rope_type", place.get("type")):
            found.append(f"{name} has type={place['type']!r} and rope_type={place['rope_type']!r}")
        for key in ("rope_theta", "partial_rotary_factor"):
            if None not in (raw.get(key), place.get(key)) and raw[key] != place[key]:
                found.append(f"{key}={raw[key]!r} stands beside {name}.{key}={place[key]!r}")
    return [f"{text}; take away what the model was not trained with" for text in found]


def _rope_type(scaling: Mapping[str, Any]) -> Any:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return "longrope" if kind == "su" else kind  # its name in the first Phi-3


def _original_violations(place: str, scaling: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with the length that the model was trained with, before its rotation was stretched."""
    original = _original(scaling, fields)
    if type(original) is not int or original < 2:
        return [f"{place}.{ORIGINAL}={original!r}; it must be a whole number above 1"]
    if scaling.get(ORIGINAL, original) != original:
        return [
            f"{ORIGINAL}={original} stands beside {place}.{ORIGINAL}={scaling[ORIGINAL]!r}, and transformers takes "
            "the former; take away what the model was not trained with"
        ]
    return []


def _original(scaling: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    return fields[ORIGINAL] if ORIGINAL in fields else scaling.get(ORIGINAL)


def _stretched(kind: str, scaling: Mapping[str, Any], fields: Mapping[str, Any], theta: float, fraction: float) -> Rope:
    """Every kind but longrope, of values that were found right."""
    if kind == "default":
        return Rope(theta, fraction=fraction)
    factor = float(scaling["factor"])
    if kind == "linear":
        return Rope(theta, "linear", factor)
    original = _original(scaling, fields)
    if kind == "llama3":
        low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
        return Rope(theta, "llama3", factor, low, high, original)
    assert kind == "yarn", kind
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_positions=original,
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        attention_factor=_yarn_attention_factor(scaling),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0.0),
    )


def _yarn_violations(place: str, scaling: Mapping[str, Any]) -> list[str]:
    found = []
    if scaling.get("truncate", True) is not True:
        found.append(f"truncate={scaling['truncate']!r} of rope scaling type 'yarn' is not supported; only True is")
    return found + [
        f"{place}.{key}={scaling[key]!r}; it must be a number of at least 0, or null"
        for key in ("mscale", "mscale_all_dim")
        if scaling.get(key) is not None and not is_number(scaling[key])
    ]


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """The temperature of YaRN (arXiv 2309.00071), as DeepSeek weighs it, unless the file states the factor."""
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor, mscale, mscale_all_dim = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")

    def concentration(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return concentration(mscale) / concentration(mscale_all_dim)
    return concentration(1.0)


def _longrope_violations(scaling: Mapping[str, Any]) -> list[str]:
    names = ("short_factor", "long_factor")
    lists = {
        key: factors
        for key in names
        if isinstance(factors := scaling.get(key), list) and all(is_number(factor, above=0.0) for factor in factors)
    }
    if wrong := [key for key in names if key not in lists]:
        return [f"longrope needs {' and '.join(wrong)}: a list of numbers above 0 each"]
    short, long = (len(factors) for factors in lists.values())
    return [f"longrope has {short} numbers in short_factor and {long} in long_factor"] if short != long else []


def _longrope(
    scaling: Mapping[str, Any], fields: Mapping[str, Any], theta: float, fraction: float
) -> tuple[Rope, list[str]]:
    """Of sequences up to original_max_position_embeddings: the short factors. Beyond, other factors hold for the whole
    sequence, so that its first tokens would change with its length: there the model ends for us."""
    limit = _original(scaling, fields)
    longest = fields["max_position_embeddings"] / limit
    found = []
    if scaling.get("factor") not in (None, longest):
        found.append(
            f"longrope with factor={scaling['factor']} is not supported; only max_position_embeddings / "
            f"{ORIGINAL} = {longest} is"
        )
    default = math.sqrt(1 + math.log(longest) / math.log(limit)) if longest > 1 else 1.0
    rope = Rope(
        theta,
        "longrope",
        original_max_positions=limit,
        factors=tuple(map(float, scaling["short_factor"])),
        attention_factor=float(scaling.get("attention_factor") or default),
        fraction=fraction,
    )
    return rope, found
