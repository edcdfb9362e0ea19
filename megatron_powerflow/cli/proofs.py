"""The command that proves a layout before it has a GPU: prove."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_powerflow.cli.options import Overrides
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import EXIT_FAILED, RankError
from megatron_powerflow.parallel.launch import read_launch


def prove(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="processes of the job; default: two replicas")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="all sizes of the layout as they are; at most 32 processes")
    ] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="write the result there, for programs")] = None,
) -> None:
    """Prove on this machine that a layout computes what one process computes, with a small model of the same family.

    Exit code 1 where it does not. It takes a minute or two, no GPU, and of the model only its config.json.

    Example: powerflow prove examples/configs/local.yaml parallel.tp=1 --world-size 4 --json proof.json
    """
    import json

    from megatron_powerflow.prove import report
    from megatron_powerflow.prove.proof import prove, subject_of
    from megatron_powerflow.targets import require
    from megatron_powerflow.whole_files import write_file

    if read_launch().world_size > 1:
        raise RankError("powerflow prove starts its own processes; call it once, without torchrun or srun")
    if as_json is not None:
        require(report.json_refusals(as_json))
    subject, console = subject_of(load_config(config, overrides or ()), world_size, full=full), make_console()
    console.print(report.opening(subject))
    proof = prove(subject, report.progress(console))
    if proof.lines:
        console.print(report.table(proof))
    console.print(report.closing(proof))
    if as_json is not None:
        write_file(as_json, json.dumps(report.to_json(proof), indent=1) + "\n")
    if not proof.holds:
        raise typer.Exit(EXIT_FAILED)
