"""The commands before a run: config, recipes, env, prepare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_powerflow.cli.options import refuse_endless
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import ALONE


def explain_config(
    key: Annotated[str | None, typer.Argument(help="a key or a section; default: all", show_default=False)] = None,
) -> None:
    """Every key of a config: type, default, meaning, and which objectives know it.

    Example: powerflow config objective.alpha
    """
    from megatron_powerflow.config_help import explain, keys

    for item in explain(key) if key else keys():
        default = f", default {item.default}" if item.default else ""
        presets = f" [only with objective.preset={', '.join(item.presets)}]" if item.presets else ""
        print(f"{item.name}  ({item.type}{default})\n    {item.meaning}{presets}")


def recipes(
    name: Annotated[str | None, typer.Argument(help="one of the list; without it the list", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="YAML file to write", show_default=False)] = None,
) -> None:
    """The recipes that come with the program: list them, or copy one to change it.

    Example: powerflow recipes reasoning_base --out my.yaml
    """
    from megatron_powerflow.recipes import copy, names

    if name is None:
        print(*(f"{recipe:24}{title}" for recipe, title in names().items()), sep="\n")
        return
    if out is None:
        raise UserError(f"--out: name the file that {name} is to be copied to")
    copy(name, out)
    print(f"wrote {out}; powerflow check {out} model.hf_path=...")


def env() -> None:
    """Versions, devices and what is missing on this machine: lines to paste into an issue.

    Example: powerflow env
    """
    from megatron_powerflow.environment import describe

    print(*describe(), sep="\n")


def prepare(
    data: Annotated[
        list[str],
        typer.Argument(
            help="numina, with files of its kind or else the published ones from the hub; creative, with the three "
            "options below; or files and hub names alone, read like numina's",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="prompts to write: .parquet; the held-out ones and a report beside it")],
    against: Annotated[
        list[str] | None, typer.Option(help="evaluation sets that no prompt may be of: files or hub names; repeatable")
    ] = None,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="share kept apart for evaluation")] = 0.01,
    max_answer: Annotated[int, typer.Option(min=1, help="characters of the longest answer")] = 60,
    max_solution: Annotated[int, typer.Option(min=1, help="characters of the longest solution")] = 9000,
    poems: Annotated[list[str] | None, typer.Option(help="creative: files of poems, to be continued")] = None,
    stories: Annotated[
        list[str] | None, typer.Option(help="creative: files of stories, whose beginnings count")
    ] = None,
    jokes: Annotated[list[str] | None, typer.Option(help="creative: files of jokes, to be finished")] = None,
    each: Annotated[int, typer.Option(min=1, help="creative: prompts of each of the three at most")] = 100,
) -> None:
    """Make prompts of published files: what has no short answer, is too long, leaks or comes twice falls out.

    Example: powerflow prepare numina --out prompts.parquet --against HuggingFaceH4/MATH-500
    """
    from megatron_powerflow.hub.fetch import locate
    from megatron_powerflow.hub.located import RequestedName
    from megatron_powerflow.prepare import lines_of, named_files
    from megatron_powerflow.prepare import prepare as run

    refuse_endless({"--held-out": held_out})
    files = named_files(data, {"poem": poems or (), "story": stories or (), "joke": jokes or ()})
    wanted = [RequestedName("dataset", name, "DATA") for names in files.values() for name in names]
    wanted += [RequestedName("dataset", name, "--against") for name in against or ()]
    report = run(
        files,
        out,
        against=against or (),
        held_out=held_out,
        each=each,
        located=locate(wanted, ALONE),
        console=make_console(),
        max_answer=max_answer,
        max_solution=max_solution,
    )
    print(*lines_of(report), sep="\n")
