"""Can servers sample for this run? What can be known of their config before any is asked. Imports no torch."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from megatron_powerflow.checkpoint.folder import WEIGHTS_NAME
from megatron_powerflow.config import Config
from megatron_powerflow.errors import UserError
from megatron_powerflow.serving.command_line import argument_violations
from megatron_powerflow.serving.server import require_url

PYTHON_SECONDS = 60.0


def server_violations(config: Config, *, starts_here: bool = False) -> list[str]:
    """Return what is wrong with rollout.vllm, a sentence each; [] for nothing, and without rollout.engine=vllm.

    starts_here: servers are started on this machine, so that their environment can be looked at.
    """
    servers = config.rollout.vllm
    if config.rollout.engine != "vllm" or config.rollout.replay is not None:
        return []
    violations = argument_violations(servers.arguments or ())
    seen: set[str] = set()
    for url in servers.urls or ():
        try:
            address = require_url(url)
        except UserError as error:
            violations += error.violations
            continue
        if address in seen:
            violations.append(f"rollout.vllm.urls names {address} twice; name it once")
        seen.add(address)
    if starts_here:
        violations += _environment_violations(servers.python)
    return violations


def _environment_violations(python: str | None) -> list[str]:
    """Why the environment that servers run in has no vLLM."""
    install = "pip install vllm there, or name the interpreter of an environment that has it: rollout.vllm.python"
    if python is None:
        if importlib.util.find_spec("vllm") is None:
            return [f"{sys.executable} has no package vllm, which rollout.vllm.start needs; {install}"]
        return []
    if shutil.which(python) is None:
        return [
            f"rollout.vllm.python={python!r}: no program of that name; name an interpreter, such as vllm/bin/python"
        ]
    looks = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", looks], capture_output=True, timeout=PYTHON_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"rollout.vllm.python={python!r}: does not run: {error}"]
    if found.returncode:
        return [f"rollout.vllm.python={python!r} has no package vllm; {install}"]
    return []


def server_lines(config: Config, num_parameters: int) -> list[str]:
    """Return the lines of `powerflow check` about servers; [] without any."""
    servers = config.rollout.vllm
    if config.rollout.engine != "vllm" or config.rollout.replay is not None:
        return []
    who = ", ".join(servers.urls) if servers.urls else f"{servers.start} that `powerflow serve` starts"
    size = num_parameters * (4 if config.precision.dtype == "fp32" else 2) / 2**30
    what = ", or the bytes of it that changed," if servers.transport == "changes" else ""
    where = "over a process group" if servers.transport == "stream" else f"from {weights_folder(config)}"
    lines = [
        f"servers   {who}; after each step they read the weights, {size:,.2f} GiB{what}",
        f"          {where}, and prove them before they sample",
    ]
    if ahead := config.rollout.steps_ahead:
        mixed = ", and change weights in mid-response" if config.rollout.in_flight_updates else ""
        lines.append(f"lag       responses are drawn up to {ahead} step(s) ahead{mixed}: docs/pages/lag.md")
    return lines


def weights_folder(config: Config) -> Path:
    """Return the folder that the weights for the servers are written to."""
    return Path(config.rollout.vllm.weights or Path(config.run.output_dir) / WEIGHTS_NAME)
