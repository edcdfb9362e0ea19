"""What is where in a run's folder? Names and lookups; no torch.

Left out: reading and writing the checkpoints themselves (`storage.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_powerflow.config_file import load_recorded_config
from megatron_powerflow.errors import UserError

CHECKPOINTS_NAME = "checkpoints"
LATEST_NAME = "latest"
POLICY_NAME = "policy"
# A converted checkpoint is laid out as Megatron-LM lays out a release, with `hf/` beside it.
RELEASE_NAME = "release"
TRACKER_NAME = "latest_checkpointed_iteration.txt"
HF_NAME = "hf"
CONFIG_NAME = "config.yaml"
PROGRESS_NAME = "progress.json"
HEAD_NAME = "log_z_head.safetensors"
INPUTS_NAME = "inputs.json"  # what a run began with: see training/inputs.py
EXPORT_NAME = "hf_export"
LOCK_NAME = "run.lock"  # whose the folder is at the moment
STOP_NAME = "stop"  # touch RUN/stop: the run saves at the end of its step and exits with 75
# Of runs whose rollouts vLLM servers draw (`serving/`): who they are, who answered what, answers, weights on their way.
SERVERS_NAME, LEDGER_NAME, IN_HAND_NAME, WEIGHTS_NAME = "servers", "ledger", "in_hand", "weights"


def checkpoint_name(step: int) -> str:
    """Return the name of a step's checkpoint, such as step_000050."""
    return f"step_{step:06d}"


def checkpoints_of(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run's folder, oldest first."""
    paths = [path for path in (run / CHECKPOINTS_NAME).glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step_")))


def latest_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint that `checkpoints/latest` names; None in a run without a checkpoint.

    Raises UserError when it names nothing that is there.
    """
    pointer = run / CHECKPOINTS_NAME / LATEST_NAME
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step_\d{6,}", name) or not (pointer.parent / name).is_dir():
        known = [path.name for path in checkpoints_of(run)]
        raise UserError(f"{pointer}: names {name!r}, which is not there; write one of {known} into it")
    return pointer.parent / name


def find_checkpoint(folder: Path, step: int | None = None) -> Path | None:
    """Return the checkpoint that a path means: one of a run, a converted one, or the latest of a run.

    step: of a run, that step's instead of the latest. None: neither, perhaps an HF folder. Raises UserError when the
    run has no checkpoint of that step, or none that became `latest`, or the path is one checkpoint and a step is given.
    """
    if is_checkpoint(folder):
        if step is not None:
            raise UserError(f"{folder}: is one checkpoint; a step is chosen among those of a run's folder")
        return folder
    if step is None:
        latest = latest_checkpoint(folder)
        if latest is None and (known := checkpoints_of(folder)):
            raise UserError(
                f"{folder}: none of its checkpoints became `latest` ({', '.join(path.name for path in known)}); name "
                f"one of them: {known[-1]}"
            )
        return latest
    by_name = {path.name: path for path in checkpoints_of(folder)}
    if checkpoint_name(step) not in by_name:
        raise UserError(f"{folder}: no checkpoint of step {step}; there are {', '.join(by_name) or 'none'}")
    return by_name[checkpoint_name(step)]


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder is one checkpoint, of a run or a converted one."""
    return is_converted(folder) or ((folder / POLICY_NAME).is_dir() and (folder / HF_NAME).is_dir())


def is_converted(folder: Path) -> bool:
    """Whether the folder is a converted checkpoint that tools/convert_hf_to_megatron.py wrote, to the end."""
    return (folder / TRACKER_NAME).is_file() and (folder / RELEASE_NAME).is_dir() and (folder / HF_NAME).is_dir()


@dataclass(frozen=True, slots=True)
class Keeps:
    """The folders that a command which reads a model must leave alone.

    apart_from, not_over: as `TargetFolder.refusals` takes them.
    """

    apart_from: tuple[Path, ...]
    not_over: tuple[Path, ...]


def keeps_of(model: Path, step: int | None = None) -> Keeps:
    """Return the folders that must be left alone where this model is read.

    They are the model's own folder or its run's checkpoints, the run's folder, and the model that the run started from.
    Raises UserError where `find_checkpoint` does, or the checkpoint's config cannot be read.
    """
    checkpoint = find_checkpoint(model, step) if model.is_dir() else None
    if checkpoint is None or is_converted(checkpoint):
        return Keeps((model,), ())
    of_a_run = checkpoint.parent.name == CHECKPOINTS_NAME
    config = checkpoint / CONFIG_NAME
    start = (Path(load_recorded_config(config).model.hf_path),) if config.is_file() else ()
    if not of_a_run:  # a checkpoint that was taken elsewhere
        return Keeps((checkpoint, *start), ())
    return Keeps((checkpoint.parent, *start), (checkpoint.parent.parent,))


def run_of(checkpoint: Path) -> Path:
    """Return the run's folder that a checkpoint lies in.

    Of a checkpoint that was taken elsewhere it returns the checkpoint itself, which has a config too.
    """
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS_NAME else checkpoint


def tensors_folder(checkpoint: Path) -> Path:
    """Return the torch_dist folder of a checkpoint."""
    return checkpoint / (RELEASE_NAME if is_converted(checkpoint) else POLICY_NAME)


def hf_folder_of(model: Path) -> Path:
    """Return the folder with config and tokenizer of the model that a run starts from.

    That is `hf/` in a converted checkpoint, and else the model's folder itself.
    """
    return model / HF_NAME if is_converted(model) else model
