"""A number that is none, or has no end, is refused by each option of the command line that takes one."""

from __future__ import annotations

import typing
from typing import get_args, get_type_hints

import pytest
from typer.testing import CliRunner

from megatron_powerflow.cli import app
from megatron_powerflow.errors import UserError

# of each command, what it needs beside the option
NEEDED = {
    "check": ("config.yaml", "--device", "80"),
    "preflight": ("config.yaml",),
    "prepare": ("numina", "--out", "prompts.parquet"),
    "generate": ("--model", "m", "--prompts", "p.jsonl", "--out", "o.jsonl", "--decoding", "power_sampling"),
}


def options_of(kind: type) -> list[tuple[str, str]]:
    """(command, option) of all that take such a number."""
    return [
        (command.name or command.callback.__name__, f"--{name.replace('_', '-')}")
        for command in app.registered_commands
        for name, hint in get_type_hints(command.callback, include_extras=True).items()
        if typing.get_origin(hint) is typing.Annotated
        for taken in [get_args(hint)[0]]
        if taken is kind or kind in get_args(taken)
    ]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("command", "option"), options_of(float))
def test_a_number_that_is_not_finite_is_refused(command, option, value):
    done = CliRunner().invoke(app, [command, *NEEDED[command], f"{option}={value}"])
    if not isinstance(done.exception, UserError):
        assert done.exit_code == 2, done.output
    said = " ".join([done.output, *getattr(done.exception, "violations", ())])
    assert option in said, said


@pytest.mark.parametrize(("command", "option"), options_of(int))
def test_no_count_is_below_0(command, option):
    done = CliRunner().invoke(app, [command, f"{option}=-1"])
    assert done.exit_code == 2, done.output
    assert f"'{option}'" in done.output, done.output
