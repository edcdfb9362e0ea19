"""What does a model family consist of, as data?

Each file of `families/` holds one `Family`.

Left out: how a config.json is read by it (`config.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_powerflow.hf.operations import Op


@dataclass(frozen=True)
class Family:
    """One model family as data: how its config.json is read, and how its tensors relate to Megatron's parameters.

    model_type: the `model_type` of config.json; it is compared as a whole, never by a part of a name.
    defaults: the values that transformers assumes where the file is silent.
    must_be: field -> the one value that we compute; any other is refused by name (null, false, 0 and [] are the same).
    overrides: (fields of the file) -> the Architecture fields that differ from the common reading.
    layer_ops, model_ops: the operations, for both directions, of a layer's tensors and of those outside the layers.
    sizes: the fields that must be whole numbers above 0, beside the common ones.
    reads: the fields that `overrides` maps, or that do nothing in this family whatever they say.
    partial_rotary: whether partial_rotary_factor counts in this family; where not, only 1.0 is accepted.
    rope_types: the ways of stretching the rotation that we compute for this family.
    nullable: the fields that may be null in this family and not in every one.
    synonyms: another name of a field -> the name by which it is read.
    violations: (fields, all present and of the right kind) -> a sentence for each thing that cannot be computed.
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
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    nullable: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    violations: Callable[[Mapping[str, Any]], list[str]] = lambda fields: []
