"""What does a model family consist of, as data? One `Family` per file of `families/`.

Left out: how a config.json is read by it (`config.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_powerflow.hf.operations import Op


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
    nullable: fields that may be null here and not in every family.
    synonyms: other name of a field -> the name by which it is read.
    violations: what else of the fields, all of them there and of the right kind, cannot be computed.
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
    nullable: tuple[str, ...] = ()
    synonyms: Mapping[str, str] = field(default_factory=dict)
    violations: Callable[[Mapping[str, Any]], list[str]] = lambda fields: []
