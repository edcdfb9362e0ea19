"""Which tensors, of which shapes, is a model made of on the Hugging Face side?

Left out: the tensors themselves (`files.py`). Importing this brings no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import InLayers, Op


class PlacedOp(NamedTuple):
    """An operation, and the global layer and expert (from 0) that its parameter belongs to; None: to none."""

    op: Op
    layer: int | None
    expert: int | None


def is_output(op: Op) -> bool:
    """Tell whether an operation's parameter is the output layer's weight."""
    return op.megatron == "output_layer.weight"


def is_embedding(op: Op) -> bool:
    """Tell whether an operation's parameter is the word embedding."""
    return op.megatron == "embedding.word_embeddings.weight"


def experts_of(op: Op, architecture: Architecture) -> Sequence[int | None]:
    """Return the experts that have a tensor of this operation each, from 0; [None] where the layer has the tensor."""
    if "{expert}" not in op.megatron:
        return [None]
    assert architecture.experts is not None, op.megatron
    return range(architecture.experts.num)


def layers_of(op: Op, architecture: Architecture) -> range:
    """Return the layers, counted from 0, that have a tensor of this operation."""
    return op.layers(architecture) if isinstance(op, InLayers) else range(architecture.num_layers)


def placed_ops(architecture: Architecture, family: Family) -> Iterator[PlacedOp]:
    """Yield one operation per parameter, in the order in which HF lists tensors: embedding, layers, the rest.

    The output weight of a model with tied embeddings is left out: the embedding stands for it.
    """
    ops = [op for op in family.model_ops if not (architecture.tied_embeddings and is_output(op))]
    yield from (PlacedOp(op, None, None) for op in ops if is_embedding(op))
    for layer in range(architecture.num_layers):
        for op in family.layer_ops:
            if layer in layers_of(op, architecture):
                yield from (PlacedOp(op, layer, expert) for expert in experts_of(op, architecture))
    yield from (PlacedOp(op, None, None) for op in ops if not is_embedding(op))


def expected_tensors(architecture: Architecture, family: Family) -> dict[str, tuple[int, ...]]:
    """Map the name of every HF tensor of a model to its shape. A tied output weight is left out."""
    return {
        name: shape
        for op, layer, expert in placed_ops(architecture, family)
        for name, shape in zip(op.hf_names(layer, expert), op.hf_shapes(architecture), strict=True)
    }


def impossible_sizes(architecture: Architecture, num_tensors: int) -> list[str]:
    """Return a violation for each count of config.json that no folder of num_tensors tensors can have.

    Callers ask this first, for everything else makes lists of that many entries.
    """
    counts = {"num_hidden_layers": architecture.num_layers}
    if architecture.experts is not None:
        counts["num_experts (num_local_experts, n_routed_experts)"] = architecture.experts.num
    return [
        f"config.json says {name}={count}, but there are only {num_tensors} tensors; copy the folder again"
        for name, count in counts.items()
        if not 1 <= count <= num_tensors
    ]
