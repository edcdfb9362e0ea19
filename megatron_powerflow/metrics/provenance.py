"""What made these numbers? The command, the versions and the commit, for each evaluation and each start of a run.

Left out: the config, which a run's folder holds whole (config.yaml).
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import megatron_powerflow
from megatron_powerflow.journal import append_lines

LAUNCHES_NAME = "launches.jsonl"
PACKAGES = ("torch", "megatron-core", "transformers", "mpmath")


def provenance(command: str, revisions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Returns command, versions {package: version}, git_commit and, where a name was the hub's, revisions.

    git_commit is None for an installed package, or without git. revisions: name on the hub -> commit.
    """
    versions = {"python": platform.python_version(), "megatron_powerflow": megatron_powerflow.__version__}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    values = {"command": command, "versions": versions, "git_commit": _git_commit()}
    return values | ({"revisions": dict(revisions)} if revisions else {})


def note_launch(
    folder: Path,
    *,
    command: str,
    first_step: int,
    world_size: int,
    revisions: Mapping[str, str] | None = None,
    changed: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Adds a line to launches.jsonl, which has one for each start of a run.

    first_step: the first step of this start; the steps before it belong to earlier ones. changed: the keys that are not
    as at the start before, each with key, before and now; they count from first_step on. Raises OSError.
    """
    line = {"first_step": first_step, "world_size": world_size, **provenance(command, revisions)}
    line |= {"changed": [dict(change) for change in changed]} if changed else {}
    append_lines(folder / LAUNCHES_NAME, [line])


def _git_commit() -> str | None:
    root = Path(megatron_powerflow.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        process = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return process.stdout.strip()
