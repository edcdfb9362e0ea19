"""May a config's text be read at all? It may come from anywhere: a recipe, a run's folder, a colleague.

- No resolver runs. OmegaConf's `${oc.env:NAME}` reads what is not in the file, and its result would stand in the run's
  config.yaml, in wandb and on the console. Only `${section.key}` is left, however it is nested or put together.
- Nothing unfolds: a kilobyte of aliases, or of interpolations of interpolations, can stand for gigabytes.

Left out: the keys (`config.py`), reading (`config_file.py`). Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from megatron_powerflow.errors import UserError

MAX_BYTES = 2**20
MAX_VALUES = 20_000  # of a file, each alias counted as often as it stands for something
MAX_DEPTH = 50
MAX_CHARACTERS = 2**20  # of all values together, with interpolations written out
INTERPOLATION = re.compile(r"\$\{([A-Za-z_][\w.]*)\}")


def check_text(text: str, source: str) -> None:
    """Raise UserError where a YAML text is too large, or its aliases unfold to too much. Makes no objects.

    Raises yaml.YAMLError where it is no YAML.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{source}: {len(text):,} characters; a config has a few hundred, and {MAX_BYTES:,} are read")
    counts: dict[str, int] = {}  # of values below an anchor
    open_nodes: list[list] = []  # [anchor, values so far] of the collections that have begun
    total = 0

    def add(number: int) -> None:
        for node in open_nodes:
            node[1] += number

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        number = 1
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_nodes):
                raise UserError(f"{source}: *{event.anchor} stands within itself; write the value out")
            number = counts.get(event.anchor or "", 1)
        elif isinstance(event, yaml.CollectionStartEvent):
            add(1)
            if len(open_nodes) >= MAX_DEPTH:
                raise UserError(f"{source}: values within values within ..., {MAX_DEPTH} deep; a config has three")
            open_nodes.append([event.anchor, 1])
            number = 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, inside = open_nodes.pop()
            if anchor:
                counts[anchor] = inside
            number = 0
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        add(number)
        total += number
        if total > MAX_VALUES:
            raise UserError(f"{source}: its aliases stand for over {MAX_VALUES:,} values; write out what is meant")


def check_interpolations(values: Mapping[str, Any], source: str) -> None:
    """Raise UserError where a value calls a resolver, or interpolations go round in a circle or unfold to too much.

    values: the sections as they stand in the file, with nothing resolved.
    """
    leaves = dict(_leaves(values, ""))
    for text in leaves.values():
        if "${" in INTERPOLATION.sub("", text):
            raise UserError(
                f"{source}: {text!r} calls a resolver; only ${{section.key}} is allowed; write the value out"
            )
    lengths: dict[str, int] = {}

    def length(key: str, path: tuple[str, ...]) -> int:
        if key in path or len(path) > MAX_DEPTH:
            raise UserError(f"{source}: ${{{key}}} stands within itself; write the value out")
        if key not in lengths:
            text = leaves.get(key)
            others = INTERPOLATION.findall(text) if text is not None else [k for k in leaves if k.startswith(f"{key}.")]
            lengths[key] = 1 + len(text or "") + sum(length(other, (*path, key)) for other in others)
        return lengths[key]

    if sum(length(key, ()) for key in leaves) > MAX_CHARACTERS:
        raise UserError(
            f"{source}: its interpolations stand for over {MAX_CHARACTERS:,} characters; write the values out"
        )


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, text) of every value in nested sections and lists; "" for one that is no text."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{name}.{place}")
    else:
        yield name, value if isinstance(value, str) else ""
