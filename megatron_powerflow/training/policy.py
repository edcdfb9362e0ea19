"""How does a policy come onto the devices? This rank's model chunks, with the weights of a folder.

Left out: what is trained of it (`session.py`).
"""

from __future__ import annotations

import math
from pathlib import Path

from megatron_powerflow.checkpoint import storage
from megatron_powerflow.checkpoint.folder import is_converted
from megatron_powerflow.config import ModelSection, PrecisionSection
from megatron_powerflow.hf.checked import open_checked
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.live_weights import load_from_hf
from megatron_powerflow.model.build import build_chunks, transformer_config
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import token_alignment
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.records import Architecture


def build_policy(
    architecture: Architecture,
    family: Family,
    layout: Layout,
    model: ModelSection,
    precision: PrecisionSection,
    groups: Groups,
) -> list[PolicyModel]:
    """Model chunks of this rank, with the weights of model.hf_path: each rank reads its own slices."""
    config = transformer_config(architecture, layout, model, precision)
    chunks = build_chunks(config, architecture, layout, precision, groups.device)
    start = Path(model.hf_path)
    if is_converted(start):
        storage.load_weights(start, chunks, groups)
    else:
        load_from_hf(chunks, open_checked(start, architecture, family), architecture, family, groups)
    return chunks


def alignment(layout: Layout, precision: PrecisionSection) -> int:
    """A rank's forward pass has a multiple of this many tokens in a row: sequence parallelism's and FP8's rules."""
    return math.lcm(layout.tp if layout.sequence_parallel else 1, token_alignment(precision))
