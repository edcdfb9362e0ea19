"""What is where in a run's folder? Names and lookups; no torch.

Left out: reading and writing the checkpoints themselves (`storage.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_powerflow.errors import UserError

LATEST_NAME = "latest"
POLICY_NAME = "policy"
HF_NAME = "hf"
CONFIG_NAME = "config.yaml"
EXPORT_NAME = "hf_export"
STOP_NAME = "stop"  # touch RUN/stop: the run saves at the end of its step and exits with 75


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def checkpoints_of(run: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def latest_checkpoint(run: Path) -> Path | None:
    """What `checkpoints/latest` names; None in a run without a checkpoint. Raises UserError when it names nothing."""
    pointer = run / "checkpoints" / LATEST_NAME
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"step_\d{6,}", name) or not (pointer.parent / name).is_dir():
        known = [path.name for path in checkpoints_of(run)]
        raise UserError(f"{pointer}: names {name!r}, which is not there; write one of {known} into it")
    return pointer.parent / name


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint a path means: a checkpoint itself, or a run's latest. None: neither, perhaps an HF folder."""
    if (folder / POLICY_NAME).is_dir() and (folder / HF_NAME).is_dir():
        return folder
    return latest_checkpoint(folder)
