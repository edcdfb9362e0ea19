"""What does a run's folder hold before its first step, and what of it may go?

A start that was refused or killed there has made nothing that is worth keeping: the same folder serves a start with
other settings. Left out: who holds the folder (`parallel/owner.py`); what comes with the steps. Imports no torch.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

from megatron_powerflow.checkpoint.folder import (
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    IN_HAND_NAME,
    INPUTS_NAME,
    LATEST_NAME,
    LEDGER_NAME,
    LOCK_NAME,
    SERVERS_NAME,
    STOP_NAME,
    WEIGHTS_NAME,
)
from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.goodput import EVENTS_NAME
from megatron_powerflow.metrics.provenance import LAUNCHES_NAME
from megatron_powerflow.metrics.step_log import EVALUATIONS_NAME, SAMPLES_NAME
from megatron_powerflow.metrics.writers import FILE_NAME as METRICS_NAME
from megatron_powerflow.outcome import OUTCOME_NAME, read_outcome
from megatron_powerflow.parallel.watch import HEARTBEATS_NAME
from megatron_powerflow.whole_files import PARTIAL_SUFFIX, is_partial_of, meant_by

CONFIG_MARK = "# the resolved config of this folder's run, written by powerflow train\n"
# What a kill of 0.1.0 left where it was writing one of the two. It is left alone, and no reason to refuse a folder.
CUT_OFF_BY_0_1_0 = ("config.yaml.partial", "metrics.partial")
# Files that a start writes before its first step is done, in the order in which they may go; config.yaml, the last,
# says that the others are ours.
JOURNALS = (METRICS_NAME, SAMPLES_NAME, EVALUATIONS_NAME, EVENTS_NAME, LAUNCHES_NAME)
FIRST_FILES = (
    *JOURNALS,
    STOP_NAME,
    OUTCOME_NAME,
    INPUTS_NAME,
    CONFIG_NAME,
)
SERVED = (LEDGER_NAME, IN_HAND_NAME, WEIGHTS_NAME)  # folders of ours; what servers answered outlives a start
FILE_OF_A_SERVER = re.compile(r"[A-Za-z0-9_.-]{1,200}-\d{1,5}\.(json|restart|log)")
PICTURES = ("curves.png", "before_after.png")  # report/ draws them


def earliest_files(folder: Path) -> tuple[str, ...]:
    """Names of files of ours that may be there before config.yaml, which says that the others are."""
    try:
        ours = read_outcome(folder) is not None
    except UserError:
        ours = False  # somebody else's file of that name
    return (STOP_NAME, OUTCOME_NAME) if ours else (STOP_NAME,)


def holds_a_run(folder: Path) -> bool:
    """Whether the folder's config.yaml is one that `powerflow train` wrote.

    No config of a user's is taken for it.
    """
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
    """Return the names of what is in a folder beside the first files of a start and its lock."""
    a_run = holds_a_run(folder)
    ours = {*FIRST_FILES, *SERVED, "wandb", "tensorboard"} if a_run else {*earliest_files(folder)}
    ours |= {*CUT_OFF_BY_0_1_0} if a_run else {CUT_OFF_BY_0_1_0[0]}
    ours |= {HEARTBEATS_NAME} if len(_heartbeats(folder)) == _num_files(folder / HEARTBEATS_NAME) else set()
    ours |= {SERVERS_NAME} if _holds_servers_only(folder / SERVERS_NAME) else set()
    cut_off = FIRST_FILES if a_run else (CONFIG_NAME, OUTCOME_NAME)
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in ours and not path.name.startswith(LOCK_NAME) and not is_partial_of(path.name, cut_off)
    )


def remove_first_files(folder: Path, *, keep_events: bool = False) -> None:
    """Remove what a start without a step left; do nothing in the folder of a run with steps.

    Only the holder of the folder may call it. keep_events: the time that the start took stays on record, and so does
    config.yaml, which says whose the record is.
    """
    if holds_a_step(folder):
        return
    remove_cut_off_files(folder)
    remove_heartbeats(folder)
    kept = (EVENTS_NAME, CONFIG_NAME) if keep_events and (folder / EVENTS_NAME).is_file() else ()
    for name in FIRST_FILES if holds_a_run(folder) else earliest_files(folder):
        if name not in kept:
            (folder / name).unlink(missing_ok=True)


def remove_heartbeats(folder: Path) -> None:
    """Away with what the ranks of earlier starts wrote of themselves. The holder's of the folder."""
    for start in _heartbeats(folder):
        shutil.rmtree(start, ignore_errors=True)
    with contextlib.suppress(OSError):  # not there, or something of somebody else's is in it
        (folder / HEARTBEATS_NAME).rmdir()


def _heartbeats(folder: Path) -> list[Path]:
    """The folder of each start's heartbeats."""
    beats = folder / HEARTBEATS_NAME
    if not beats.is_dir() or beats.is_symlink():
        return []
    starts = [path for path in beats.iterdir() if re.fullmatch(r"[0-9a-f]{32}", path.name)]
    return [path for path in starts if path.is_dir() and not path.is_symlink()]


def _holds_servers_only(folder: Path) -> bool:
    """Whether the folder has only what `powerflow serve` writes: servers may be there before the run is."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return all(FILE_OF_A_SERVER.fullmatch(meant_by(path.name) or path.name) for path in folder.iterdir())


def _num_files(folder: Path) -> int:
    return len([*folder.iterdir()]) if folder.is_dir() else 0


def remove_cut_off_files(folder: Path) -> None:
    """Remove what is left of files and checkpoints that were being written when a start was killed.

    Only the holder of the folder may call it.
    """
    of_a_run = {
        ".": "|".join(map(re.escape, (*FIRST_FILES, *PICTURES))),
        CHECKPOINTS_NAME: LATEST_NAME,
        "rollouts": r"step_\d{6,}\.jsonl",
    }
    before_config = {".": "|".join(map(re.escape, (CONFIG_NAME, OUTCOME_NAME)))}
    for place, names in (of_a_run if holds_a_run(folder) else before_config).items():
        for path in (folder / place).glob(".*" + PARTIAL_SUFFIX):
            if re.fullmatch(names, meant_by(path.name) or ""):
                path.unlink(missing_ok=True)
    for path in (folder / CHECKPOINTS_NAME).glob("step_*" + PARTIAL_SUFFIX):
        if re.fullmatch(rf"step_\d{{6,}}{re.escape(PARTIAL_SUFFIX)}", path.name):
            shutil.rmtree(path, ignore_errors=True)
