"""Will a run find what it needs beside the model? Packages, environment, a folder to write in, room on the disk, time.

Left out: GPUs and their memory, which only a started process can ask for.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from datetime import datetime
from pathlib import Path

from megatron_powerflow.checkpoint.folder import checkpoints_of
from megatron_powerflow.config import Config
from megatron_powerflow.parallel.device_sums import determinism_violations
from megatron_powerflow.rollout.rollout_files import ROLLOUTS_NAME, step_file
from megatron_powerflow.serving.checks import weights_folder
from megatron_powerflow.time_limit import seconds_until_stop

CHECKPOINT_BYTES = 14  # a parameter: bf16 weights, their fp32 masters and Adam's two moments
GIB = 2**30


def _time(config: Config) -> list[str]:
    """A start after its limit would make one step, stop, be started again, and so on."""
    text = str(config.run.stop_before or "")
    if (seconds := seconds_until_stop(text, datetime.now())) is None or seconds > 0:
        return []
    return [f"run.stop_before={text} is over; name a later time, a duration such as 23h30m, or null"]


def resource_violations(config: Config, num_parameters: int | None) -> list[str]:
    """Return what a run needs and does not have, a sentence each with what to do; [] for nothing.

    num_parameters: of the model, where it is known.
    """
    violations = [*_packages(config), *_time(config)]
    violations += determinism_violations() if config.run.deterministic else []
    folder = Path(config.run.output_dir)
    above = next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), None)
    if above is None or not os.access(above, os.W_OK):
        is_read_only = above is not None and os.statvfs(above).f_flag & os.ST_RDONLY
        why = "Read-only file system" if is_read_only else "Permission denied"
        return [
            *violations,
            f"run.output_dir={config.run.output_dir!r}: {above} cannot be written ({why}); name another folder",
        ]
    if num_parameters is None:
        return violations
    served, beside = _room_for_servers(config, num_parameters, above)
    violations += beside
    count = num_checkpoints(config)
    # a run that goes on has some of its checkpoints on the disk already; another one is written before one is removed
    left = max(count - len(checkpoints_of(folder)), 1)
    needed, free = needed_bytes(config, num_parameters, left) + served, shutil.disk_usage(above).free
    if needed > free:
        export = " and the export" if config.run.export else ""
        export += " and the weights for the servers" if served else ""
        violations.append(
            f"run.output_dir={config.run.output_dir!r}: {left} checkpoint(s){export} take {_size(needed)}, and "
            f"{_size(free)} are free there; set checkpoint.keep, raise checkpoint.interval, or write elsewhere"
        )
    return violations


def _room_for_servers(config: Config, num_parameters: int, disk_of_run: Path) -> tuple[int, list[str]]:
    """Return (bytes on the disk of the run's folder, what is wrong with another disk) of weights for vLLM servers.

    A version stays until all servers have the next one; with changes, until those are worth a half of the whole.
    """
    servers = config.rollout.vllm
    if config.rollout.engine != "vllm" or config.rollout.replay is not None or servers.transport == "stream":
        return 0, []
    whole = num_parameters * (4 if config.precision.dtype == "fp32" else 2)
    needed = int(whole * (2.5 if servers.transport == "changes" else 2))
    folder = weights_folder(config).absolute()
    above = next(path for path in (folder, *folder.parents) if path.is_dir())
    if not os.access(above, os.W_OK):
        return 0, [f"rollout.vllm.weights={str(folder)!r}: {above} cannot be written; name another folder"]
    if above.stat().st_dev == disk_of_run.stat().st_dev:
        return needed, []
    free = shutil.disk_usage(above).free
    if needed <= free:
        return 0, []
    return 0, [
        f"rollout.vllm.weights={str(folder)!r}: two versions of the weights take {_size(needed)}, and {_size(free)} "
        "are free there; name a folder on another disk"
    ]


def buffer_violations(config: Config, first_step: int) -> list[str]:
    """Return why a run that goes on before `first_step` has not the rollouts of the steps that it trains on again."""
    folder = Path(config.run.output_dir) / ROLLOUTS_NAME
    steps = range(max(0, first_step - config.rollout.buffer_steps), first_step)
    missing = [path for step in steps if not (path := step_file(folder, step)).is_file()]
    if not missing:
        return []
    return [
        f"rollout.buffer_steps={config.rollout.buffer_steps}: {', '.join(map(str, missing))}: not there, and step "
        f"{first_step} trains on those rollouts too; put them back, or continue from another checkpoint"
    ]


def _size(num_bytes: int) -> str:
    """A size in the largest unit of which there is one."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"


def num_checkpoints(config: Config) -> int:
    """Return the most checkpoints that are on the disk at one time.

    While one is written the oldest is still there.
    """
    section = config.checkpoint
    made = math.ceil(config.run.num_steps / section.interval) if section.interval else 1
    if section.keep is None:
        return made
    stay = config.run.num_steps // section.keep_every if section.keep_every else 0
    return min(made, section.keep + 1 + stay)


def saving_line(config: Config, num_parameters: int, num_processes: int) -> str:
    """What a save takes, for `powerflow check`. The bytes are those of bf16 training; in fp32 there are fewer."""
    whole = num_parameters * CHECKPOINT_BYTES / GIB
    if not config.checkpoint.asynchronous:
        return f"saves     {whole:,.2f} GiB a checkpoint; each step that saves waits for the disk"
    return (
        f"saves     {whole:,.2f} GiB a checkpoint, written from a copy while training goes on: about "
        f"{whole / num_processes:,.2f} GiB of host memory a process"
    )


def needed_bytes(config: Config, num_parameters: int, num_checkpoints: int) -> int:
    """Return the bytes that so many checkpoints, and the export if the run makes one, take on the disk."""
    exported = (4 if config.precision.dtype == "fp32" else 2) if config.run.export else 0
    return num_parameters * (num_checkpoints * CHECKPOINT_BYTES + exported)


def _packages(config: Config) -> list[str]:
    wanted = {
        "matplotlib": (config.metrics.curves, "metrics.curves=true", "metrics.curves=false"),
        "tensorboard": (config.metrics.tensorboard, "metrics.tensorboard=true", "metrics.tensorboard=false"),
        "wandb": (config.metrics.wandb != "off", f"metrics.wandb={config.metrics.wandb}", "metrics.wandb=off"),
    }
    return [
        f"{key} needs the package {package}: pip install {package}, or set {instead}"
        for package, (is_wanted, key, instead) in wanted.items()
        if is_wanted and importlib.util.find_spec(package) is None
    ]
