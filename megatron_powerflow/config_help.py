"""What does each key of a config mean? For `powerflow config`: type, default, meaning, and which objectives know it.

Left out: the keys themselves (`config.py`), what hangs on what (`config_rules.py`).
"""

from __future__ import annotations

import contextlib
import difflib
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_powerflow.config import Config, Section
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.config_rules import CONDITIONAL
from megatron_powerflow.errors import UserError
from megatron_powerflow.objective.presets import PRESETS

# keys that give others an effect
OPENERS: tuple[dict[str, Any], ...] = ({"task_reward": "gold"}, {"psi": -0.5}, {"log_z": "mlp"})
SMALLEST = {"model": {"hf_path": "model"}, "prompts": {"path": "prompts"}, "run": {"output_dir": "run"}}


@dataclass(frozen=True)
class KeyHelp:
    """What `powerflow config` shows of one key. presets: the objectives for which it has an effect; empty: all of
    them, or the key does not depend on the objective."""

    name: str
    type: str
    default: str
    meaning: str
    presets: tuple[str, ...] = ()


def keys() -> Iterator[KeyHelp]:
    """Yield every key, in the order of the sections."""
    for section, outer in Config.model_fields.items():
        yield from _keys_of(section, outer.annotation)


def _keys_of(section: str, fields: Any) -> Iterator[KeyHelp]:
    for name, field in fields.model_fields.items():
        key = f"{section}.{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys_of(key, field.annotation)
            continue
        yield KeyHelp(key, _type(field.annotation, field), _default(field), field.description or "", _presets(key))


def explain(name: str) -> list[KeyHelp]:
    """Return the key, or all keys of a section. Raises UserError for a name that is neither, with the likely ones."""
    matching = [key for key in keys() if key.name == name or key.name.startswith(f"{name}.")]
    if not matching:
        names = [key.name for key in keys()]
        close = difflib.get_close_matches(name, [*names, *Config.model_fields], n=3, cutoff=0.5)
        close += [key for key in names if key.endswith(f".{name}") and key not in close]
        raise UserError(f"{name}: no such key" + (f"; did you mean {', '.join(close)}?" if close else ""))
    return matching


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "must be given"
    if field.default is None:
        return ""  # the description says what None becomes
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default)


def _type(annotation: Any, field: FieldInfo | None = None) -> str:
    """Name a type in the words of YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_type(part) for part in arguments if part is not type(None))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {str: "text", int: "whole number", float: "number", bool: "true | false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _presets(key: str) -> tuple[str, ...]:
    """Ask the rules themselves which objectives know a key: a config of each preset, alone and with each key of
    OPENERS, without which some keys have no effect whatever the objective."""
    rule = next((rule for rule in CONDITIONAL if rule[0] == key), None)
    if rule is None or not key.startswith(("objective.", "run.stop_at_alpha")):
        return ()
    known = tuple(name for name in PRESETS if any(map(rule[2], _of_preset(name))))
    return () if len(known) == len(PRESETS) or not known else known


def _of_preset(name: str) -> Iterator[Config]:
    for opener in ({}, *OPENERS):
        with contextlib.suppress(UserError):  # a key that this objective does not know
            yield parse_config({**SMALLEST, "objective": {"preset": name, **opener}})
