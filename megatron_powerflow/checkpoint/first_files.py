"""What does a run's folder hold before its first step, and what of it may go?

A start that was refused or killed there has made nothing that is worth keeping: the same folder serves a start with
other settings. Left out: who holds the folder (`parallel/owner.py`); what comes with the steps. Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from megatron_powerflow.checkpoint.folder import CHECKPOINTS_NAME, CONFIG_NAME, INPUTS_NAME, LOCK_NAME, STOP_NAME
from megatron_powerflow.metrics.provenance import LAUNCHES_NAME
from megatron_powerflow.metrics.step_log import EVALUATIONS_NAME, SAMPLES_NAME
from megatron_powerflow.metrics.writers import FILE_NAME as METRICS_NAME

CONFIG_MARK = "# the resolved config of this folder's run, written by powerflow train\n"
# Files that a start writes before its first step is done, in the order in which they may go; config.yaml, the last,
# says that the others are ours.
FIRST_FILES = (
    METRICS_NAME,
    "metrics.partial",
    SAMPLES_NAME,
    f"{SAMPLES_NAME}.partial",
    EVALUATIONS_NAME,
    f"{EVALUATIONS_NAME}.partial",
    LAUNCHES_NAME,
    STOP_NAME,
    INPUTS_NAME,
    f"{INPUTS_NAME}.partial",
    f"{CONFIG_NAME}.partial",
    CONFIG_NAME,
)


def holds_a_run(folder: Path) -> bool:
    """Whether its config.yaml is one that `powerflow train` wrote: no config of a user's is taken for it."""
    config = folder / CONFIG_NAME
    if not config.is_file():
        return False
    with config.open(encoding="utf-8", errors="replace") as file:
        marked = file.readline() == CONFIG_MARK
    # runs of before the mark
    return marked or (folder / LAUNCHES_NAME).is_file() or (folder / CHECKPOINTS_NAME).is_dir()


def holds_a_step(folder: Path) -> bool:
    """Whether any step's numbers, rollouts or checkpoint are there."""
    metrics = folder / METRICS_NAME
    if metrics.is_file() and metrics.stat().st_size > 0:
        return True
    return any(any((folder / name).glob("step_*")) for name in (CHECKPOINTS_NAME, "rollouts"))


def not_ours(folder: Path) -> list[str]:
    """What is in a folder beside the first files of a start and its lock."""
    ours = {*FIRST_FILES, "wandb", "tensorboard"} if holds_a_run(folder) else {f"{CONFIG_NAME}.partial", STOP_NAME}
    names = (path.name for path in folder.iterdir())
    return sorted(name for name in names if name not in ours and not name.startswith(LOCK_NAME))


def remove_first_files(folder: Path) -> None:
    """Away with what a start without a step left. The holder's of the folder."""
    if holds_a_step(folder):
        return
    for name in FIRST_FILES if holds_a_run(folder) else (f"{CONFIG_NAME}.partial", STOP_NAME):
        (folder / name).unlink(missing_ok=True)
