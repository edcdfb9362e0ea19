"""The command of a job's nodes: preflight.

Thin: it parses, validates, hands over. torch is imported inside it only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_powerflow.cli.options import Overrides, refuse_endless
from megatron_powerflow.config_file import load_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import read_launch


def preflight(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    seconds: Annotated[
        float, typer.Option(help="for which a rank may be late, at the start and in each group")
    ] = 120.0,
    slow: Annotated[float, typer.Option(help="times the usual that make a node slow; 0: none is")] = 3.0,
    out: Annotated[Path | None, typer.Option(help="JSON: exit code, what is wrong, nodes to keep out")] = None,
) -> None:
    """Try a job's nodes before a model is loaded: who is missing, silent or slow. Under the launcher of `train`.

    75: a node is at fault, and named; start again without it. It sums over every group of the layout, in time.

    Example: torchrun --nproc-per-node 2 -m megatron_powerflow.cli preflight examples/configs/local.yaml parallel.pp=2
    """
    refuse_endless({"--seconds": seconds, "--slow": slow})
    wrong = {"--seconds": seconds > 0, "--slow": slow == 0 or slow > 1}
    if refused := [
        f"{name}: {'above 0' if name == '--seconds' else '0, or above 1'}" for name in wrong if not wrong[name]
    ]:
        raise UserError(refused)
    settings, launch = load_config(config, overrides or ()), read_launch()
    from megatron_powerflow.parallel.layout import layout_of_sizes
    from megatron_powerflow.preflight.preflight import Preflight

    layout = layout_of_sizes(settings.parallel, launch.world_size)
    code = Preflight(settings, layout, launch, seconds=seconds, slow=slow, out=out).run()
    if code:
        raise typer.Exit(code)
