"""What do several commands share: how overrides are given, and which options make no sense together?"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import command_line

MODEL_HELP = "HF folder, run folder, checkpoint or converted one, or OWNER/NAME[@REVISION] on the hub"


def _complete_key(incomplete: str) -> list[str]:
    """For the shell's Tab: the keys of a config that begin so."""
    from megatron_powerflow.config_help import keys

    return [f"{key.name}=" for key in keys() if key.name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="section.key=value, as many as wanted; null takes a value away",
        show_default=False,
        autocompletion=_complete_key,
    ),
]

OverriddenKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--override-resume",
        metavar="KEY",
        help="let a run go on although this key is not as it was; repeatable",
        show_default=False,
    ),
]


def refuse_options(options: Mapping[str, object], unused: bool, why: str) -> None:
    """UserError for the options that were given where they change nothing."""
    given = [name for name, value in options.items() if value is not None]
    if unused and given:
        raise UserError([f"{name} has no effect with {why}; remove it" for name in given])


def refuse_endless(options: Mapping[str, float | None]) -> None:
    """UserError for numbers that are not finite: typer's limits let `nan` pass, and `inf` without an upper one."""
    endless = {name: value for name, value in options.items() if value is not None and not math.isfinite(value)}
    if endless:
        raise UserError([f"{name} {value}: give a number that is finite" for name, value in endless.items()])


def typed_command() -> str:
    """Write the command of this process for the folders that it fills: powerflow, or the module a launcher runs."""
    by_name = Path(sys.argv[0]).name == "powerflow"
    return command_line(*(["powerflow"] if by_name else ["python", "-m", "megatron_powerflow.cli"]), *sys.argv[1:])


def say_notices(notes: list[str]) -> None:
    """What was left out of files that were read, to stderr."""
    for note in notes:
        print(f"notice: {note}", file=sys.stderr)
