"""What does `powerflow check` find, and how does it show it?

Left out: the judgement itself (`training/plan.py`), the rehearsal (`rehearsal/`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_powerflow.config import Config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import read_launch

if TYPE_CHECKING:
    from megatron_powerflow.rehearsal.devices import Device
    from megatron_powerflow.rehearsal.job import Job
    from megatron_powerflow.rehearsal.rehearsal import Rehearsal

CONFIG_ALONE = (
    "notice    {folder} holds config.json alone: the sizes are its own; tokenizer, prompts, weights and the run's "
    "folder were not looked at, and `train` would refuse it as it is"
)


@dataclass(frozen=True)
class Checked:
    """A run that has been found possible. text: its description; job: its sizes."""

    text: str
    job: Job


def checked(config: Config, world_size: int, overridden: Sequence[str], *, sizes_will_do: bool) -> Checked:
    """Look at everything that is known without a GPU or a second process.

    sizes_will_do: whether a model's folder may hold config.json and nothing else. Raises UserError with every
    violation.
    """
    from megatron_powerflow.rehearsal.job import Job, holds_config_alone, job_of_config

    folder = Path(config.model.hf_path)
    if sizes_will_do and holds_config_alone(folder):
        job = job_of_config(config, folder, world_size)
        layout = f"layout    {job.layout.describe()}\n{job.layout.picture()}"
        return Checked(f"{layout}\n{CONFIG_ALONE.format(folder=folder)}", job)
    from megatron_powerflow.run_folder import holder_of
    from megatron_powerflow.training.fetched import fetch_inputs
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.plan_lines import describe

    located = fetch_inputs(config, read_launch(), world_size=world_size, weights=False, overridden=overridden)
    plan = make_plan(config, world_size, weights=False, located=located, overridden=overridden)
    if held := holder_of(plan.run_folder):
        raise UserError(held)
    return Checked(describe(plan), Job(plan.config, plan.architecture, plan.layout))


def rehearse_here(job: Job, device: Device, save_delay: float | None, node_hours: float | None) -> Rehearsal:
    """Rehearse the job in this process, which can compute nothing afterwards; stderr says what goes on."""
    from megatron_powerflow.rehearsal.prepare import prepare

    prepare()
    from megatron_powerflow.rehearsal.rehearsal import rehearse

    console = make_console(sys.stderr)
    return rehearse(job, device, save_delay=save_delay, node_hours=node_hours, say=console.print)


def show_check(console: Console, found: Checked, rehearsal: Rehearsal | None, *, as_json: bool) -> None:
    """Print what was found beyond its text: tables, or everything as JSON."""
    if not as_json:
        if rehearsal is not None:
            from megatron_powerflow.rehearsal.tables import print_rehearsal

            print_rehearsal(console, rehearsal)
        return
    answer: dict = {"description": found.text.splitlines(), "layout": found.job.layout.describe(), "rehearsal": None}
    if rehearsal is not None:
        from megatron_powerflow.rehearsal.tables import rehearsal_json

        answer["rehearsal"] = rehearsal_json(rehearsal)
    print(json.dumps(answer, indent=2))
