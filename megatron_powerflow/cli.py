"""The command line: `powerflow train|check|score|generate|curves`.

Thin: parses, validates, hands over. torch is imported inside the commands only, so `--help` and `check` are quick
and an impossible run never reaches it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_powerflow.config import load_config
from megatron_powerflow.errors import EXIT_REQUEUE, EXIT_USER_ERROR, RequeueRequested, UserError
from megatron_powerflow.parallel.initialize import read_launch

app = typer.Typer(
    name="powerflow",
    help="PowerFlow on Megatron-Core: sharpen or flatten a language model without labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, as many as wanted", show_default=False)]


@app.command()
def train(config: Annotated[Path, typer.Argument(help="YAML file")], overrides: Overrides = None) -> None:
    """Train: alone, under torchrun, or under srun. Started again, the same command continues.

    Example: torchrun --nproc-per-node 2 -m megatron_powerflow.cli train examples/configs/local.yaml parallel.pp=2
    """
    launch = read_launch()
    settings = load_config(config, overrides or ())
    from megatron_powerflow.training.plan import make_plan

    plan = make_plan(settings, launch.world_size)
    console = Console()
    if launch.is_main:
        from megatron_powerflow.training.plan import describe

        console.print(describe(plan), highlight=False, soft_wrap=True)
    from megatron_powerflow.train import train as run

    run(plan, launch, console)
    if launch.is_main:
        from megatron_powerflow.checkpoint.folder import latest_checkpoint

        console.print(f"done: {plan.run_folder} (latest checkpoint {latest_checkpoint(plan.run_folder)})", highlight=False)


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(help="processes; default: one replica, tp * cp * pp")] = None,
) -> None:
    """Say everything that is wrong with a run, without GPUs or processes; or print its layout.

    Example: powerflow check examples/configs/local.yaml parallel.tp=3 --world-size 6
    """
    settings = load_config(config, overrides or ())
    from megatron_powerflow.training.plan import describe, make_plan

    parallel = settings.parallel
    plan = make_plan(settings, world_size or parallel.tp * parallel.cp * parallel.pp)
    Console().print(describe(plan), highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the console script. Exit codes: 0, 2 the user's mistake, 75 start me again, else a bug."""
    # a traceback belongs to a bug; a user's mistake is one line per violation, printed once
    try:
        app(standalone_mode=False)
    except UserError as error:
        if read_launch().rank == 0:
            for violation in error.violations:
                print(f"error: {violation}", file=sys.stderr)
        _leave(EXIT_USER_ERROR)
    except RequeueRequested as request:
        if read_launch().rank == 0:
            print(request, file=sys.stderr)
        _leave(EXIT_REQUEUE)
    except typer.Exit as request:
        sys.exit(request.exit_code)
    except typer.Abort:
        sys.exit(130)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if read_launch().world_size > 1 else sys.exit(code)


if __name__ == "__main__":
    main()
