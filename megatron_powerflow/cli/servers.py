"""The commands of the servers that sample for a run: vllm-args, serve.

Thin: they parse, validate, hand over. No torch is imported.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import psutil
import typer

from megatron_powerflow.cli.options import Overrides
from megatron_powerflow.config import Config
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import gpus_of
from megatron_powerflow.parallel.slurm_job import node_name
from megatron_powerflow.serving.checks import server_violations
from megatron_powerflow.serving.command_line import ServerCommand, command_of
from megatron_powerflow.serving.supervisor import Supervisor

DEFAULT_PORT = 8200


def vllm_args(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    number: Annotated[int, typer.Option(min=0, max=1000, help="of the server on its machine, from 0")] = 0,
) -> None:
    """Print the command that starts a vLLM server for a run, and say what is wrong with it.

    For servers that somebody else starts: rollout.vllm.urls names them. Their weights become the run's own.

    Example: powerflow vllm-args examples/configs/local.yaml rollout.engine=vllm rollout.vllm.start=1
    """
    command, _ = _command(load_config(config, overrides or ()), number)
    print(command.text)


def serve(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    number: Annotated[int, typer.Option(min=0, max=1000, help="of the server on its machine, from 0")] = 0,
    host: Annotated[str | None, typer.Option(help="name or address by which the trainer finds this machine")] = None,
) -> None:
    """Run a vLLM server for a run, and start it anew when it ends, until this command is ended.

    It announces itself in RUN/servers, where `powerflow train` with rollout.vllm.start finds it.

    Example: powerflow serve examples/configs/local.yaml rollout.engine=vllm rollout.vllm.start=1
    """
    settings = load_config(config, overrides or ())
    if settings.rollout.vllm.start is None:
        raise UserError("powerflow serve: rollout.vllm.start says how many servers this command is run for; set it")
    command, port = _command(settings, number)
    say = make_console().print
    Supervisor(Path(settings.run.output_dir), command, host=host or _own_address(), port=port, say=say).run()


def _command(settings: Config, number: int) -> tuple[ServerCommand, int]:
    """The command of a server, and its port. Raises UserError with everything that is wrong."""
    if settings.rollout.engine != "vllm":
        raise UserError(f"rollout.engine={settings.rollout.engine}: no server samples for this run; set it to vllm")
    if violations := server_violations(settings, starts_here=True):
        raise UserError(violations)
    port = (settings.rollout.vllm.port or DEFAULT_PORT) + number
    gpus = gpus_of(number, settings.rollout.vllm.tp or 1)
    return command_of(settings, Path(settings.model.hf_path), port=port, gpus=gpus), port


def _own_address() -> str:
    """The name of this machine where it resolves to an address that others reach, else such an address."""
    name = node_name()
    try:
        if not socket.gethostbyname(name).startswith("127."):
            return name
    except OSError:
        pass
    addresses = [item.address for items in psutil.net_if_addrs().values() for item in items]
    ipv4 = [address for address in addresses if address.count(".") == 3 and not address.startswith("127.")]
    return ipv4[0] if ipv4 else "127.0.0.1"
