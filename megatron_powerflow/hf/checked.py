"""Are the tensors of a folder those that its config.json asks for?

Only the files' headers are compared; no numbers are read but those of a tied output weight that is stored twice.

Left out: how tensors are read (`files.py`), where they go (`live_weights.py`).
"""

from __future__ import annotations

from pathlib import Path

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.files import SafetensorsFolder, check_tensor_names, tied_weight_violations
from megatron_powerflow.hf.shapes import expected_tensors, impossible_sizes, is_embedding, is_output


def open_checked(folder: str | Path, architecture: Architecture, family: Family) -> SafetensorsFolder:
    """Open an HF folder and check that it holds every tensor of the architecture exactly once, and no other.

    A tied model may store its output weight as well, but then it must equal the embedding.
    Raises UserError, which lists what is wrong.
    """
    source = SafetensorsFolder(folder)
    if violations := impossible_sizes(architecture, len(source.names())):
        raise UserError([f"{folder}: {violation}" for violation in violations])
    outputs = [name for op in family.model_ops if is_output(op) for name in op.hf_names(None)]
    tied = outputs if architecture.tied_embeddings else []
    check_tensor_names(source, expected_tensors(architecture, family), tied)
    (embedding,) = (name for op in family.model_ops if is_embedding(op) for name in op.hf_names(None))
    if violations := [text for output in tied for text in tied_weight_violations(source, output, embedding)]:
        raise UserError(violations)
    return source
