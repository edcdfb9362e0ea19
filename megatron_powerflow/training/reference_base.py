"""Which base do a run's reference scores belong to, and how many does the store hold of it?

Left out: the store's files (`reference_store/`), finding and keeping scores (`known_scores.py`). Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import Config
from megatron_powerflow.reference_store.folder import count_store, is_store, store_violations

NAMES = ("architecture", "temperature", "precision")


def base_of(config: Config, architecture: Architecture) -> dict[str, Any]:
    """Return what a base is beside the numbers of its weights, as it comes back from JSON, by NAMES."""
    about = {
        "architecture": asdict(architecture),
        "temperature": config.rollout.temperature,
        "precision": config.precision.model_dump(),
    }
    return json.loads(json.dumps(about))


def kept_scores_violations(config: Config) -> list[str]:
    """Return why the folder of `model.reference_store` cannot be one, a sentence each; [] where it can, or is none."""
    if config.model.reference_store is None:
        return []
    return store_violations(Path(config.model.reference_store), Path(config.run.output_dir))


def kept_scores_lines(config: Config, architecture: Architecture, weights: str | None) -> list[str]:
    """Return the lines of `powerflow check` on the store: what it holds of this base, and what is damaged.

    weights: digest of the files of the base's weights, None where they are not there.
    """
    if config.model.reference_store is None:
        return []
    folder = Path(config.model.reference_store)
    if not is_store(folder):
        return [f"reference its scores are kept in {folder}, which is made when training starts"]
    counts, notes = count_store(folder)
    ours = base_of(config, architecture)
    fitting = [count for count in counts if fits(count.about, ours, weights)]
    passes, responses = sum(c.num_passes for c in fitting), sum(c.num_responses for c in fitting)
    of_weights = "of this base" if weights else "of a base of this config (the weights are not here to be compared)"
    return [
        f"reference its scores are kept in {folder}, which holds {responses:,} responses of {passes:,} passes "
        f"{of_weights}, temperature and number format; those found again are of passes over the same micro-batches",
        *(f"notice    {note}" for note in notes),
    ]


def fits(about: Mapping[str, Any], ours: Mapping[str, Any], weights: str | None) -> bool:
    """Whether what a store says of a base is true of ours. weights: as in `kept_scores_lines`."""
    return all(about.get(name) == ours[name] for name in NAMES) and weights in (None, about.get("weights"))
