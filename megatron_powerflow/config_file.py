"""How does a file become a config? YAML plus dotted overrides (`objective.alpha=2`), read by OmegaConf, checked by
pydantic; an unknown key, a wrong type and a key without an effect are errors, and all of them are reported together.

Left out: the keys (`config.py`), which keys depend on which (`config_rules.py`). Imports no torch.
"""

from __future__ import annotations

import copy
import difflib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_powerflow.config import Config, Section
from megatron_powerflow.config_rules import CONDITIONAL, contradictions
from megatron_powerflow.config_text import check_interpolations, check_text
from megatron_powerflow.errors import UserError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, validate. Raises UserError with every violation."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file; `powerflow recipes` lists what can be copied")
    try:
        text = path.read_text(encoding="utf-8")
        check_text(text, str(path))
        loaded = OmegaConf.load(io.StringIO(text))
    except UserError:
        raise
    except Exception as error:  # of two foreign readers of a foreign file: assertions and recursion limits, too
        raise UserError(f"{path}: not a YAML file that can be read: {_one_line(error)}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path}: must hold sections ({', '.join(Config.model_fields)}), got {type(loaded).__name__}")
    return parse_config(loaded, overrides, source=str(path))


def load_recorded_config(path: Path) -> Config:
    """Read the config.yaml that a run has written. Raises UserError with every violation, each with the file's path."""
    try:
        return load_config(path)
    except UserError as error:
        raise UserError([text if str(path) in text else f"{path}: {text}" for text in error.violations]) from None


def parse_config(values: Any, overrides: Sequence[str] = (), *, source: str = "config") -> Config:
    """Validate values that are in memory (a dict of sections), with overrides applied, as `load_config` does.

    Raises UserError with every violation. source: what messages call the values.
    """
    malformed = [item for item in overrides if not re.match(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+=", item)]
    if malformed:
        raise UserError([f"override {item!r} is not of the form section.key=value" for item in malformed])
    try:
        merged = OmegaConf.merge(OmegaConf.create(values), OmegaConf.from_dotlist(list(overrides)))
        raw: Any = OmegaConf.to_container(merged, resolve=False)
        check_interpolations(raw, source)
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(f"{source}: {_one_line(error)}") from None
    assert isinstance(plain, dict), "sections"
    return _validate(plain)


def dump_config(config: Config) -> str:
    """Write the resolved config as YAML; `load_config` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)


def config_keys() -> list[str]:
    """Return every dotted key, in the order of the sections."""
    return [key for section in Config.model_fields for key in _keys_below([section])]


def _keys_below(path: list[str]) -> list[str]:
    fields = _fields_of(path)
    return [
        key
        for name in fields
        for key in (_keys_below([*path, name]) if _fields_of([*path, name]) else [".".join([*path, name])])
    ]


def _validate(plain: dict) -> Config:
    config, violations, wrong = _typed(plain)
    if config is None:
        raise UserError(violations)
    conflicts = []
    for key, default, applies, why in CONDITIONAL:
        value = _get(config, key)
        if applies(config) and value is None:
            config = _with(config, key, default(config) if callable(default) else default)
        elif not applies(config) and value is not None:
            conflicts.append(f"{key}={value!r} has no effect because {why}; remove it")
    conflicts += contradictions(config)
    violations += [text for text in conflicts if not any(key in text for key in wrong)]
    if violations:
        raise UserError(violations)
    return config


def _typed(plain: dict) -> tuple[Config | None, list[str], list[str]]:
    """Give the values their types: the config, what is wrong, and the keys that are.

    A wrong value is left out of the config, and a missing one stands in it as a text, so that what contradicts each
    other in the rest is said at the same time. None where the rest is no config either.
    """
    try:
        return Config.model_validate(plain), [], []
    except ValidationError as error:
        items = error.errors()
    rest = copy.deepcopy(plain)
    for item in items:
        *above, key = _key_of(item)
        section = rest
        for name in above:
            section = section.setdefault(name, {}) if isinstance(section, dict) else {}
        if item["type"] == "missing" and above:
            section[key] = "missing"
        elif isinstance(section, dict):
            section.pop(key, None)
    try:
        config = Config.model_validate(rest)
    except ValidationError:
        config = None
    return config, [_sentence(item, plain) for item in items], [".".join(_key_of(item)) for item in items]


def _key_of(item: Any) -> list[str]:
    """The key that a pydantic error is about: its place, without what is inside of a value."""
    path = [str(part) for part in item["loc"]]
    depth = 1
    while depth < len(path) and _fields_of(path[:depth]):
        depth += 1
    return path[:depth]


def _with(section: Any, key: str, value: Any) -> Any:
    """Return the section, or the whole config, with another value under a dotted key."""
    name, _, rest = key.partition(".")
    return section.model_copy(update={name: _with(getattr(section, name), rest, value) if rest else value})


def _sentence(item: Any, plain: dict) -> str:
    """Write one pydantic error as: key, what was given, what must hold, what to do."""
    path = [str(part) for part in item["loc"]]
    key, kind, got = ".".join(path), item["type"], item["input"]
    if kind == "extra_forbidden":
        siblings = list(Config.model_fields) if len(path) == 1 else list(_fields_of(path[:-1]))
        close = difflib.get_close_matches(path[-1], siblings, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{key}={got!r}: unknown key; {hint}known: {', '.join(siblings)}"
    if kind == "missing":
        return (
            f"{key}: missing; it has no default ({_description(path)})" if len(path) > 1 else f"{key}: section missing"
        )
    if kind == "literal_error":
        return f"{key}={got!r}: must be one of {item['ctx']['expected']}"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    return f"{key}={got!r}: {message}"


def _description(path: list[str]) -> str:
    return _fields_of(path[:-1])[path[-1]].description or path[-1]


def _fields_of(path: list[str]) -> dict[str, FieldInfo]:
    """Return the fields of a section, by the keys that a file has for them; {} for a key that is no section.

    path: the section's name, and that of one within it.
    """
    fields: Any = Config
    for name in path:
        found = {field.alias or key: field for key, field in fields.model_fields.items()}.get(name)
        fields = found.annotation if found is not None else None
        if not (isinstance(fields, type) and issubclass(fields, Section)):
            return {}
    return {field.alias or name: field for name, field in fields.model_fields.items()}


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
