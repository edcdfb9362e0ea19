"""Are the tensors of a folder those that its config.json asks for? Asked of the headers, before any of them is read.

Left out: how tensors are read (`files.py`), where they go (`live_weights.py`).
"""

from __future__ import annotations

from pathlib import Path

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.files import SafetensorsFolder, check_tensor_names, tied_twice
from megatron_powerflow.hf.shapes import expected_tensors, impossible_sizes, is_embedding, is_output


def open_checked(folder: str | Path, architecture: Architecture, family: Family) -> SafetensorsFolder:
    """Open an HF folder and hold it against the architecture: every tensor once, none missing, none extra; an output
    weight that is tied is the embedding's, where it is there at all. Raises UserError."""
    source = SafetensorsFolder(folder)
    if found := impossible_sizes(architecture, len(source.names())):
        raise UserError([f"{folder}: {violation}" for violation in found])
    outputs = [name for op in family.model_ops if is_output(op) for name in op.hf_names(None)]
    tied = outputs if architecture.tied_embeddings else []
    check_tensor_names(source, expected_tensors(architecture, family), tied)
    (embedding,) = (name for op in family.model_ops if is_embedding(op) for name in op.hf_names(None))
    if found := [text for output in tied for text in tied_twice(source, output, embedding)]:
        raise UserError(found)
    return source
