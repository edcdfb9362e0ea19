"""How does a policy come onto the devices, and who samples from it?

A policy is this rank's model chunks, with the weights of a folder of any kind; the engine over them samples.

Left out: what is trained of it (`session.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.checkpoint import storage
from megatron_powerflow.checkpoint.folder import is_checkpoint
from megatron_powerflow.config import Config, ModelSection, PrecisionSection
from megatron_powerflow.hf.checked import open_checked
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.finite import require_finite
from megatron_powerflow.hf.live_weights import load_from_hf
from megatron_powerflow.model.build import build_chunks, transformer_config
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.rollout.megatron_engine import MegatronEngine


def build_policy(
    architecture: Architecture,
    family: Family,
    layout: Layout,
    model: ModelSection,
    precision: PrecisionSection,
    groups: Groups,
) -> list[PolicyModel]:
    """Build the model chunks of this rank, with the weights of a folder.

    Each rank reads its own slices. model.hf_path: here a Hugging Face folder, a run's checkpoint or a converted one.
    Collective over the run. Raises UserError when the folder is damaged, or holds a number that is not finite.
    """
    config = transformer_config(architecture, layout, model, precision)
    chunks = build_chunks(config, architecture, layout, precision, groups.device)
    start = Path(model.hf_path)
    if is_checkpoint(start):
        storage.load_weights(start, chunks, groups)
        require_finite(chunks, family, groups, start)
    else:
        source = open_checked(start, architecture, family)
        load_from_hf(chunks, source, architecture, family, groups)
        require_finite(chunks, family, groups, source)
    return chunks


def copy_policy(
    chunks: Sequence[PolicyModel],
    architecture: Architecture,
    layout: Layout,
    model: ModelSection,
    precision: PrecisionSection,
    groups: Groups,
) -> list[PolicyModel]:
    """Build the model chunks of this rank once more, with the weights of `chunks`; no file is read."""
    config = transformer_config(architecture, layout, model, precision)
    copies = build_chunks(config, architecture, layout, precision, groups.device)
    with torch.no_grad():
        for copy, chunk in zip(copies, chunks, strict=True):
            for kind in ("named_parameters", "named_buffers"):
                whole = dict(getattr(chunk, kind)())
                for name, tensor in getattr(copy, kind)():
                    tensor.copy_(whole[name])
    return copies


def build_engine(
    chunks: Sequence[PolicyModel], architecture: Architecture, layout: Layout, config: Config, groups: Groups
) -> MegatronEngine:
    """Build the engine over these chunks, as `rollout` of the config has it."""
    return MegatronEngine(
        chunks,
        groups,
        vocab_size=architecture.vocab_size,
        max_concurrent_rows=config.rollout.max_concurrent_rows,
        alignment=layout.token_multiple(config.precision),
    )


def alignment(layout: Layout, precision: PrecisionSection) -> int:
    """Return `layout.token_multiple(precision)`: a name of 0.1.0, until 0.3."""
    return layout.token_multiple(precision)
