"""Which checkpoint does a run continue, and is its folder this run's at all? By its config, key by key.

Left out: what was read when it began, by content (`inputs.py`).
"""

from __future__ import annotations

from pathlib import Path

from megatron_powerflow.checkpoint.first_files import holds_a_run, holds_a_step, not_ours
from megatron_powerflow.checkpoint.folder import (
    CONFIG_NAME,
    INPUTS_NAME,
    latest_checkpoint,
)
from megatron_powerflow.config import Config
from megatron_powerflow.config_file import load_config
from megatron_powerflow.errors import UserError

# A run's folder belongs to the run that has these; anything else may change when a run is continued.
CHANGEABLE = frozenset(
    {"run.name", "run.num_steps", "run.export", "model.reference", "model.recompute", "optimizer.distributed"}
    | {"optimizer.max_skipped_steps", "rollout.max_concurrent_rows", "rollout.save", "run.stop_on_alarm"}
    | {"run.stop_at_alpha", "run.stop_before", "run.hang_seconds"}
)


BY_CONTENT = frozenset({"model.hf_path", "prompts.path", "rollout.replay"})


CHANGEABLE_SECTIONS = frozenset({"alarm", "parallel", "checkpoint", "evaluation", "metrics"})


def find_resume(config: Config) -> Path | None:
    """The checkpoint to continue from. Raises UserError when the folder is another run's, or no run's.

    A folder in which a start was killed before its first step is no run's yet, whatever its settings were.
    """
    folder = Path(config.run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.output_dir={str(folder)!r} is a file; name a folder")
    if not folder.is_dir() or not ((held := not_ours(folder)) or holds_a_step(folder)):
        return None
    if not holds_a_run(folder):
        raise UserError(
            f"run.output_dir={str(folder)!r} holds other files and no run ({', '.join(held[:3])}); name a new folder"
        )
    differences = _differences(load_config(folder / CONFIG_NAME), config, by_content=(folder / INPUTS_NAME).is_file())
    if differences:
        raise UserError(
            [f"run.output_dir={str(folder)!r} is the folder of another run: {item}" for item in differences]
            + ["name a new run.output_dir, or take these keys back"]
        )
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None and config.checkpoint.resume == "never":
        raise UserError(
            f"run.output_dir={str(folder)!r} holds {checkpoint.name} and checkpoint.resume=never; "
            "name a new folder, or continue with checkpoint.resume=auto"
        )
    return checkpoint


def _differences(theirs: Config, ours: Config, *, by_content: bool) -> list[str]:
    """by_content: what the paths name is compared by its content, elsewhere."""
    differences, elsewhere = [], BY_CONTENT if by_content else frozenset()
    for section, values in ours.model_dump().items():
        other = theirs.model_dump()[section]
        for key, value in values.items():
            name = f"{section}.{key}"
            if section in CHANGEABLE_SECTIONS or name in CHANGEABLE | elsewhere or name == "run.output_dir":
                continue
            if other[key] != value:
                differences.append(f"its {name} is {other[key]!r}, not {value!r}")
    return differences
