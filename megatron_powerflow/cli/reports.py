"""The commands that read what runs have left: curves, report, goodput."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_powerflow.cli.options import say_notices
from megatron_powerflow.console import make_console
from megatron_powerflow.parallel.launch import command_line


def curves(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    out: Annotated[Path | None, typer.Option(help="PNG; default: curves.png in the first run")] = None,
) -> None:
    """Draw the training curves of one or more runs.

    Example: powerflow curves runs/local
    """
    from megatron_powerflow.report.curves import CURVES_NAME, draw_curves

    notes: list[str] = []
    print(draw_curves(runs, out or runs[0] / CURVES_NAME, notes))
    say_notices(notes)


def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or folders with an evaluation.json")],
    out: Annotated[Path, typer.Option(help="folder for index.html and its pictures")],
) -> None:
    """Compare runs on one page: tables and pictures, seeds of one configuration taken together.

    Example: powerflow report runs/la_tb_s0 runs/la_tb_s1 runs/rl_token_s0 evaluations/base --out report
    """
    from megatron_powerflow.report.page import build_report

    command = command_line("powerflow", "report", *map(str, runs), "--out", str(out))
    print(build_report(runs, out, command))


def goodput(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    as_json: Annotated[bool, typer.Option("--json", help="numbers for programs, on stdout")] = False,
) -> None:
    """Where the time of a run went, over all its starts: productive, lost, saving, loading, waiting; what ended them.

    Example: powerflow goodput runs/local
    """
    import json

    from megatron_powerflow.report.goodput_table import goodput_json, goodput_table, read_all
    from megatron_powerflow.run_folder import is_running

    notes: list[str] = []
    found = read_all({run: is_running(run) for run in runs}, notes)
    if as_json:
        print(json.dumps({str(run): goodput_json(goodput) for run, goodput in found.items()}, indent=2))
    else:
        for run, goodput in found.items():
            make_console().print(goodput_table(run, goodput))
    say_notices(notes)
