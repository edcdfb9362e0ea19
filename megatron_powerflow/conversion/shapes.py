"""Which tensors, of which shapes, is a model made of on the Hugging Face side? No torch."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_powerflow.conversion.hf_config import Family
from megatron_powerflow.conversion.ops import InLayers, Op
from megatron_powerflow.records import Architecture


def is_output(op: Op) -> bool:
    return op.megatron == "output_layer.weight"


def is_embedding(op: Op) -> bool:
    return op.megatron == "embedding.word_embeddings.weight"


def experts_of(op: Op, architecture: Architecture) -> Sequence[int | None]:
    """The experts that have a tensor of this operation each; [None] where it is the layer's own."""
    return range(architecture.experts.num) if "{expert}" in op.megatron else [None]


def layers_of(op: Op, architecture: Architecture) -> range:
    """The layers that have a tensor of this operation."""
    return op.layers(architecture) if isinstance(op, InLayers) else range(architecture.num_layers)


def expected_tensors(architecture: Architecture, family: Family) -> dict[str, tuple[int, ...]]:
    """Every HF tensor with its shape. A tied output weight is no tensor of its own."""
    ops = [(op, None, None) for op in family.model_ops if not (architecture.tied_embeddings and is_output(op))]
    ops += [
        (op, layer, expert)
        for layer in range(architecture.num_layers)
        for op in family.layer_ops
        if layer in layers_of(op, architecture)
        for expert in experts_of(op, architecture)
    ]
    return {
        name: shape
        for op, layer, expert in ops
        for name, shape in zip(op.hf_names(layer, expert), op.hf_shapes(architecture), strict=True)
    }
