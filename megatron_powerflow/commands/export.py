"""How does a checkpoint's policy become a Hugging Face folder? `powerflow export`.

Left out: the order of tensors and the files (`hf/live_weights.py`), the model card (`model_card.py`).
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megatron_powerflow.checkpoint.folder import (
    is_converted,
    run_of,
)
from megatron_powerflow.checkpoint.state import read_progress
from megatron_powerflow.commands.open_model import OpenModel, load_chunks
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.live_weights import export_to_hf
from megatron_powerflow.model_card import card_files
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.targets import export_target, require


def export_file(opened: OpenModel, out: Path, launch: Launch, console: Console, *, command: str = "") -> None:
    """Write a checkpoint's policy as an HF folder, with a model card where the checkpoint is a run's.

    Raises UserError for a folder that is no checkpoint, or when `out` may not be written.
    """
    if opened.checkpoint is None:
        raise UserError(f"{opened.hf_folder}: no checkpoint of a run; it is a Hugging Face folder already")
    require(export_target(out).refusals(apart_from=opened.keeps.apart_from, not_over=opened.keeps.not_over))
    card = None
    if launch.is_main and not is_converted(opened.checkpoint):
        card = card_files(run_of(opened.checkpoint), read_progress(opened.checkpoint).step, command)
    with initialized(opened.layout, launch, seed=0) as groups:
        chunks = load_chunks(opened, groups)
        export_to_hf(
            chunks,
            opened.architecture,
            opened.family,
            groups,
            companions=opened.hf_folder,
            out=out,
            source=opened.checkpoint,
            more=card,
        )
    if launch.is_main:
        console.print(f"wrote {out}{served_at(opened.config.rollout.temperature)}")


def served_at(temperature: float) -> str:
    """Return the reminder to serve at the temperature of training, which no file of an export states; "" at 1."""
    if temperature == 1.0:
        return ""
    return f"; it was trained at rollout.temperature={temperature:g} and must be served at that temperature"
