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

from megatron_powerflow.cli.checking import checked, rehearse_here, show_check
from megatron_powerflow.cli.options import OverriddenKeys, Overrides, refuse_endless, refuse_options, typed_command
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import EXIT_FAILED, EXIT_USER_ERROR, UserError, disk_refusal
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
        from megatron_powerflow.training.plan_lines import describe

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
    world_size: Annotated[int | None, typer.Option(min=1, help="processes; default: one replica, tp * cp * pp")] = None,
    override_resume: OverriddenKeys = None,
    device: Annotated[
        str | None,
        typer.Option(help="rehearse every kind of rank for h100-80, h200-141, b200-180 or a GPU of so many GiB"),
    ] = None,
    save_delay: Annotated[
        float | None,
        typer.Option(min=0, max=1e6, help="seconds that training loses by a save, where they were measured"),
    ] = None,
    node_hours: Annotated[
        float | None,
        typer.Option(min=1, max=1e9, help="hours between two failures of a node; default: Llama 3's, 6,335"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="numbers for programs, on stdout")] = False,
) -> None:
    """Say everything that is wrong with a run, without GPUs or processes; or print its layout.

    With --device: what each kind of rank needs in each phase, whether that fits and what near it would, how long a step
    takes. Exit code 2 where it does not fit. Of a model on the hub it fetches config and tokenizer only, and says what
    it could not look at.

    Example: powerflow check examples/configs/local.yaml parallel.tp=3 --world-size 6
    """
    refuse_endless({"--save-delay": save_delay, "--node-hours": node_hours})
    settings = load_config(config, overrides or ())
    parallel = settings.parallel
    world_size = world_size or parallel.tp * parallel.cp * parallel.pp
    refuse_options({"--save-delay": save_delay, "--node-hours": node_hours}, device is None, "a check without --device")
    from megatron_powerflow.rehearsal.devices import device_of

    wanted = None if device is None else device_of(device)
    found = checked(settings, world_size, override_resume or (), sizes_will_do=wanted is not None)
    console = make_console()
    if not as_json:
        console.print(found.text)
    rehearsal = rehearse_here(found.job, wanted, save_delay, node_hours) if wanted is not None else None
    show_check(console, found, rehearsal, as_json=as_json)
    if rehearsal is not None and not rehearsal.fits:
        raise typer.Exit(EXIT_USER_ERROR)


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

    The last line says where a start would go on: a script that compares it sees whether a start has got on.

    Example: powerflow outcome runs/local
    """
    from megatron_powerflow.outcome import read_outcome, remove_outcome
    from megatron_powerflow.run_folder import holder_of

    folder = run if run.is_dir() else Path(load_config(run, overrides or ()).run.output_dir)
    if forget:
        if held := holder_of(folder):
            raise UserError(held)
        remove_outcome(folder)
        return print(_next_start(folder))
    found = read_outcome(folder)
    if found is None:
        print(f"{folder}: no start has left its outcome there\n{_next_start(folder)}")
        raise typer.Exit(EXIT_FAILED)
    print(f"{folder}: {found.describe()}")
    if found.exit_code is None:
        print(f"{holder_of(folder) or 'nobody holds the folder: that run was killed'}")
    print(_next_start(folder))
    raise typer.Exit(EXIT_FAILED if found.exit_code is None else found.exit_code)


def _next_start(run: Path) -> str:
    from megatron_powerflow.checkpoint.folder import latest_checkpoint

    try:
        latest = latest_checkpoint(run)
    except UserError:
        return "a start would look for the newest whole checkpoint"
    return f"a start would continue from {latest.name}" if latest else "a start would begin anew"


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


def inspect(folder: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Say whether every prompt of a run's finished steps was answered once, and by whom: what its ledger holds.

    For runs whose rollouts vLLM servers draw. Exit code 2 where a prompt was answered twice or never.

    Example: powerflow inspect runs/served
    """
    from megatron_powerflow.checkpoint.folder import CONFIG_NAME
    from megatron_powerflow.config_file import load_recorded_config
    from megatron_powerflow.journal import read_journal
    from megatron_powerflow.metrics.writers import FILE_NAME
    from megatron_powerflow.serving.ledger import has_ledger, ledger_report

    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder}: no run's folder: {CONFIG_NAME} is not there")
    if not has_ledger(folder):
        raise UserError(f"{folder}: no ledger there: its rollouts were not drawn by vLLM servers")
    config = load_recorded_config(folder / CONFIG_NAME)
    steps = [line.get("step") for line in read_journal(folder / FILE_NAME).lines]
    num_steps = max((step for step in steps if type(step) is int), default=-1) + 1
    for line in ledger_report(folder, num_steps=num_steps, prompts_per_step=config.rollout.prompts_per_step):
        print(line)
