"""How many parameters has a model? Importing this brings no torch."""

from __future__ import annotations

from math import prod

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.shapes import expected_tensors


def num_parameters(architecture: Architecture) -> int:
    """Parameters of the whole model, tied embeddings once."""
    return sum(prod(shape) for shape in expected_tensors(architecture, FAMILIES[architecture.family]).values())
