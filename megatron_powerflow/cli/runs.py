"""The commands of a run: train, check, stop, outcome.

Thin: they parse, validate, hand over. torch is imported inside them only, so `check` is quick and an impossible run
never reaches it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_powerflow.cli.options import OverriddenKeys, Overrides, typed_command
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import EXIT_FAILED, UserError, disk_refusal
from megatron_powerflow.parallel.initialize import describe_device, prepare_imports
from megatron_powerflow.parallel.launch import read_launch

if TYPE_CHECKING:
    from megatron_powerflow.run_end import RunEnd

A_BENCHMARK = "HuggingFaceH4/MATH-500"


def train(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    override_resume: OverriddenKeys = None,
) -> None:
    """Train: alone, under torchrun, or under srun. Started again, the same command continues.

    Example: torchrun --nproc-per-node 2 -m megatron_powerflow.cli train examples/configs/local.yaml parallel.pp=2
    """
    from megatron_powerflow.run_end import RunEnd

    with RunEnd(read_launch()) as end:
        _train(config, overrides or (), override_resume or (), end)


def _train(config: Path, overrides: Sequence[str], overridden: Sequence[str], end: RunEnd) -> None:
    launch = end.launch
    settings = load_config(config, overrides)
    end.of_run(Path(settings.run.output_dir))
    from megatron_powerflow.training.fetched import fetch_inputs
    from megatron_powerflow.training.plan import make_plan

    located = fetch_inputs(settings, launch, world_size=launch.world_size, overridden=overridden)
    plan = make_plan(settings, launch.world_size, located=located, overridden=overridden)
    console = make_console()
    if launch.is_main:
        from megatron_powerflow.training.plan import describe

        console.print(describe(plan))
    prepare_imports()
    if launch.is_main:
        console.print(describe_device())
    from megatron_powerflow.train import train as run

    run(plan, launch, console, command=typed_command(), end=end)
    if launch.is_main:
        console.print(_done(plan.run_folder))


def check(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(help="processes; default: one replica, tp * cp * pp")] = None,
    override_resume: OverriddenKeys = None,
) -> None:
    """Say everything that is wrong with a run, without GPUs or processes; or print its layout.

    Of a model on the hub it fetches config and tokenizer only, and says what it could not look at.

    Example: powerflow check examples/configs/local.yaml parallel.tp=3 --world-size 6
    """
    settings = load_config(config, overrides or ())
    from megatron_powerflow.training.fetched import fetch_inputs
    from megatron_powerflow.training.plan import describe, make_plan

    parallel = settings.parallel
    world_size = world_size or parallel.tp * parallel.cp * parallel.pp
    overridden = override_resume or ()
    located = fetch_inputs(settings, read_launch(), world_size=world_size, weights=False, overridden=overridden)
    plan = make_plan(settings, world_size, weights=False, located=located, overridden=overridden)
    from megatron_powerflow.run_folder import holder_of

    if held := holder_of(plan.run_folder):
        raise UserError(held)
    make_console().print(describe(plan))


def stop(config: Annotated[Path, typer.Argument(help="YAML file")], overrides: Overrides = None) -> None:
    """Ask a running run to save at the end of its step and to exit with 75. The same command continues it.

    Example: powerflow stop examples/configs/local.yaml run.output_dir=runs/local
    """
    from megatron_powerflow.checkpoint.folder import CONFIG_NAME, LOCK_NAME, STOP_NAME
    from megatron_powerflow.whole_files import own_file

    folder = Path(load_config(config, overrides or ()).run.output_dir)
    if not (folder / CONFIG_NAME).is_file() and not (folder / LOCK_NAME).is_file():
        raise UserError(f"{folder}: no run has started there")
    try:
        own_file(folder / STOP_NAME).touch()
    except OSError as error:
        raise disk_refusal(error) from None
    print(f"{folder} will stop at the end of its step")


def outcome(
    run: Annotated[Path, typer.Argument(help="run folder, or the YAML file of `train`")],
    overrides: Overrides = None,
    forget: Annotated[bool, typer.Option("--forget", help="instead: remove it, before a new start")] = False,
) -> None:
    """How a run's last start ended, with that exit code: also where torchrun made it 1. Scripts requeue on 75.

    Example: powerflow outcome runs/local
    """
    from megatron_powerflow.outcome import read_outcome, remove_outcome
    from megatron_powerflow.run_folder import holder_of

    folder = run if run.is_dir() else Path(load_config(run, overrides or ()).run.output_dir)
    if forget:
        if held := holder_of(folder):
            raise UserError(held)
        return remove_outcome(folder)
    found = read_outcome(folder)
    if found is None:
        print(f"{folder}: no start has left its outcome there")
        raise typer.Exit(EXIT_FAILED)
    print(f"{folder}: {found.describe()}")
    if found.exit_code is None:
        print(f"{holder_of(folder) or 'nobody holds the folder: that run was killed'}")
    raise typer.Exit(EXIT_FAILED if found.exit_code is None else found.exit_code)


def _done(run: Path) -> str:
    """What a finished run has left, and the commands that go on from there: each can be typed as it stands."""
    from megatron_powerflow.checkpoint.folder import EXPORT_NAME, latest_checkpoint

    latest = latest_checkpoint(run)
    lines = [f"done: {run}, " + (f"latest checkpoint {latest}" if latest else "no checkpoint that became `latest`")]
    if (run / EXPORT_NAME).is_dir():
        lines.append(f"  serve it     {shlex.join(['vllm', 'serve', str(run / EXPORT_NAME)])}")
    measure = ["powerflow", "evaluate", "--model", str(run), "--data", A_BENCHMARK, "--out", str(run / "evaluation")]
    look = ["powerflow", "report", str(run), "--out", str(run / "report")]
    return "\n".join([*lines, f"  measure it   {shlex.join(measure)}", f"  look at it   {shlex.join(look)}"])
