"""Which rotation does a config.json ask for?

The fields of transformers 4 (rope_theta, rope_scaling) and of transformers 5 (rope_parameters) are read into a `Rope`.
A file may have several of them. transformers takes one and passes the others over; this reader demands that they agree.

Left out: the frequencies (`model/rotary.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_powerflow.architecture import Rope
from megatron_powerflow.hf.config_kinds import is_number
from megatron_powerflow.hf.family import Family

DEFAULT_THETA = 10_000.0
ORIGINAL = "original_max_position_embeddings"
# Rope scaling type -> the numbers that it needs, and those that it may have. All are above 0.
NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ("factor",)}
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow"), "longrope": ("attention_factor", "factor")}


class RopeReading(NamedTuple):
    """The rotation that a config.json asks for, and a sentence for everything of it that cannot be computed.

    The rotation has no meaning where there is a violation.
    """

    rope: Rope
    violations: list[str]


def read_rope(raw: Mapping[str, Any], fields: Mapping[str, Any], family: Family) -> RopeReading:
    """Read the rotation from the fields of a config.json.

    raw: what the file says; fields: the same over the family's defaults. rope_parameters and rope_scaling must be
    objects or null.
    """
    scalings: dict[str, Mapping[str, Any]] = {
        name: fields[name] for name in ("rope_scaling", "rope_parameters") if fields.get(name)
    }
    violations = _contradictions(scalings, raw, fields)
    field, scaling = next(iter(scalings.items()), ("rope_parameters", {}))
    if layers := [key for key, value in scaling.items() if isinstance(value, dict)]:
        violations.append(f"{field} has parts for {', '.join(layers)}; only one rotation for all layers is supported")
        return RopeReading(Rope(DEFAULT_THETA), violations)
    theta = scaling.get("rope_theta", fields.get("rope_theta", DEFAULT_THETA))
    if not is_number(theta, above=1.0):
        violations.append(f"rope_theta={theta!r}; it must be a number above 1")
    fraction = scaling.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if not is_number(fraction, above=0.0) or fraction > 1.0:
        violations.append(f"partial_rotary_factor={fraction!r}; it must be a number above 0, at most 1.0")
    elif fraction != 1.0 and not family.partial_rotary:
        violations.append(f"partial_rotary_factor={fraction!r} is not supported for {family.model_type}; only 1.0 is")
    kind = _rope_type(scaling)
    if kind not in family.rope_types:
        known = ", ".join(family.rope_types)
        violations.append(
            f"{field}: rope scaling type {kind!r} is not supported for {family.model_type}; supported: {known}"
        )
        return RopeReading(Rope(DEFAULT_THETA), violations)
    violations += [
        f"{field}.{key}={scaling.get(key)!r}; rope scaling type {kind!r} needs a number above 0"
        for key in (*NEEDED.get(kind, ()), *OPTIONAL.get(kind, ()))
        if not is_number(scaling.get(key), above=0.0)
        and not (key in OPTIONAL.get(kind, ()) and scaling.get(key) is None)
    ]
    if kind in ("llama3", "yarn", "longrope"):
        violations += _original_violations(field, scaling, fields)
    if kind == "longrope":
        violations += _longrope_violations(scaling)
    elif kind == "yarn":
        violations += _yarn_violations(field, scaling)
    elif kind == "llama3" and not violations and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        violations.append(f"{field}.low_freq_factor={scaling['low_freq_factor']!r} is not below high_freq_factor")
    if violations:
        return RopeReading(Rope(DEFAULT_THETA), violations)
    if kind == "longrope":
        return _longrope(scaling, fields, float(theta), float(fraction))
    return RopeReading(_stretched(kind, scaling, fields, float(theta), float(fraction)), violations)


def _contradictions(
    scalings: Mapping[str, Mapping[str, Any]], raw: Mapping[str, Any], fields: Mapping[str, Any]
) -> list[str]:
    """Name what the file says of the rotation in two of its fields, and differently.

    scalings: rope_scaling and rope_parameters by name, those that the file has.
    """
    contradictions = []
    if len(scalings) == 2:
        outside = {"rope_theta": fields.get("rope_theta", DEFAULT_THETA)}
        first, second = (
            {**outside, **scaling, "rope_type": _rope_type(scaling), "type": None} for scaling in scalings.values()
        )
        if differ := [key for key in sorted({*first, *second}) if first.get(key) != second.get(key)]:
            contradictions.append(f"rope_parameters and rope_scaling differ in {', '.join(differ)}")
    for name, scaling in scalings.items():
        if scaling.get("type", scaling.get("rope_type")) != scaling.get("rope_type", scaling.get("type")):
            contradictions.append(f"{name} has type={scaling['type']!r} and rope_type={scaling['rope_type']!r}")
        for key in ("rope_theta", "partial_rotary_factor"):
            if None not in (raw.get(key), scaling.get(key)) and raw[key] != scaling[key]:
                contradictions.append(f"{key}={raw[key]!r} stands beside {name}.{key}={scaling[key]!r}")
    return [f"{text}; take away what the model was not trained with" for text in contradictions]


def _rope_type(scaling: Mapping[str, Any]) -> Any:
    """Return the type of a rope scaling, unchecked, by the name that it has today."""
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return "longrope" if kind == "su" else kind  # its name in the first Phi-3


def _original_violations(field: str, scaling: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Name what is wrong with the length that the model was trained with before its rotation was stretched.

    field: the name of `scaling` in the file.
    """
    original = _original(scaling, fields)
    if type(original) is not int or original < 2:
        return [f"{field}.{ORIGINAL}={original!r}; it must be a whole number above 1"]
    if scaling.get(ORIGINAL, original) != original:
        return [
            f"{ORIGINAL}={original} stands beside {field}.{ORIGINAL}={scaling[ORIGINAL]!r}, and transformers takes "
            "the former; take away what the model was not trained with"
        ]
    return []


def _original(scaling: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    return fields[ORIGINAL] if ORIGINAL in fields else scaling.get(ORIGINAL)


def _stretched(kind: str, scaling: Mapping[str, Any], fields: Mapping[str, Any], theta: float, fraction: float) -> Rope:
    """Build the rotation of every kind but longrope. The values have been checked before."""
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
        whole_pairs=scaling.get("truncate", True),
        attention_factor=_yarn_attention_factor(scaling),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0.0),
    )


def _yarn_violations(field: str, scaling: Mapping[str, Any]) -> list[str]:
    violations = []
    factor = scaling.get("factor")
    if is_number(factor, above=0.0) and not is_number(factor, least=1.0):
        violations.append(f"{field}.factor={factor!r}; rope scaling type 'yarn' stretches, so it must be at least 1.0")
    if type(truncate := scaling.get("truncate", True)) is not bool:
        violations.append(f"{field}.truncate={truncate!r}; it must be true or false")
    return violations + [
        f"{field}.{key}={scaling[key]!r}; it must be a number of at least 0, or null"
        for key in ("mscale", "mscale_all_dim")
        if scaling.get(key) is not None and not is_number(scaling[key])
    ]


def _yarn_attention_factor(scaling: Mapping[str, Any]) -> float:
    """Return what YaRN (arXiv 2309.00071) multiplies cosines and sines by.

    That is the file's attention_factor; or c(mscale) / c(mscale_all_dim) where the file has both, as DeepSeek's does;
    or c(1), with c(m) = 0.1 m ln(factor) + 1.
    """
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


def _longrope(scaling: Mapping[str, Any], fields: Mapping[str, Any], theta: float, fraction: float) -> RopeReading:
    """Build the rotation of longrope with its short factors, for up to original_max_position_embeddings tokens.

    Longer sequences take other factors for all their tokens, so that the first ones would change with the length; for
    us the model ends there (`Architecture.max_positions`). The values have been checked before.
    """
    limit = _original(scaling, fields)
    longest = fields["max_position_embeddings"] / limit
    violations = []
    if scaling.get("factor") not in (None, longest):
        violations.append(
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
    return RopeReading(rope, violations)
