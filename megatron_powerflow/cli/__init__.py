"""The command line: powerflow train|check|prove|preflight|config|recipes|prepare|score|generate|evaluate|export|...

The commands are in files of their own (runs, proofs, cluster, models, ...); here they get their names and their order.
"""

from __future__ import annotations

from typing import Annotated

import typer

from megatron_powerflow import __version__
from megatron_powerflow.children import end_spawned_with_parent
from megatron_powerflow.cli.cluster import preflight
from megatron_powerflow.cli.inputs import env, explain_config, prepare, recipes
from megatron_powerflow.cli.leaving import run_and_leave
from megatron_powerflow.cli.models import evaluate, export, generate, score
from megatron_powerflow.cli.proofs import prove
from megatron_powerflow.cli.reports import curves, goodput, report
from megatron_powerflow.cli.runs import check, inspect, outcome, stop, train
from megatron_powerflow.cli.servers import serve, vllm_args

end_spawned_with_parent()  # in a process that Megatron starts for its checkpoints
app = typer.Typer(
    name="powerflow",
    help="PowerFlow on Megatron-Core: sharpen or flatten a language model without labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        print(f"powerflow {__version__}")
        raise typer.Exit


@app.callback()
def powerflow(
    version: Annotated[
        bool, typer.Option("--version", help="say the version and exit", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """PowerFlow on Megatron-Core: sharpen or flatten a language model without labels."""


app.command()(train)
app.command()(check)
app.command()(prove)
app.command()(preflight)
app.command(name="config")(explain_config)
app.command(name="vllm-args")(vllm_args)
app.command()(serve)
for command in (
    recipes,
    env,
    prepare,
    score,
    generate,
    evaluate,
    export,
    curves,
    report,
    goodput,
    stop,
    outcome,
    inspect,
):
    app.command()(command)


def main() -> None:
    """Entry point of the console script; the process ends with it."""
    run_and_leave(app)
