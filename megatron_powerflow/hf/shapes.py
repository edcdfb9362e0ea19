"""Which tensors, of which shapes, is a model made of on the Hugging Face side? No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import InLayers, Op


def is_output(op: Op) -> bool:
    return op.megatron == "output_layer.weight"


def is_embedding(op: Op) -> bool:
    return op.megatron == "embedding.word_embeddings.weight"


def experts_of(op: Op, architecture: Architecture) -> Sequence[int | None]:
    """The experts that have a tensor of this operation each; [None] where it is the layer's own."""
    if "{expert}" not in op.megatron:
        return [None]
    assert architecture.experts is not None, op.megatron
    return range(architecture.experts.num)


def layers_of(op: Op, architecture: Architecture) -> range:
    """The layers that have a tensor of this operation."""
    return op.layers(architecture) if isinstance(op, InLayers) else range(architecture.num_layers)


def placed_ops(architecture: Architecture, family: Family) -> Iterator[tuple[Op, int | None, int | None]]:
    """(operation, layer, expert) of every parameter, in the order in which HF lists tensors: embedding, layers, rest.

    The output weight of a model with tied embeddings is no parameter of its own.
    """
    ops = [op for op in family.model_ops if not (architecture.tied_embeddings and is_output(op))]
    yield from ((op, None, None) for op in ops if is_embedding(op))
    for layer in range(architecture.num_layers):
        for op in family.layer_ops:
            if layer in layers_of(op, architecture):
                yield from ((op, layer, expert) for expert in experts_of(op, architecture))
    yield from ((op, None, None) for op in ops if not is_embedding(op))


def expected_tensors(architecture: Architecture, family: Family) -> dict[str, tuple[int, ...]]:
    """Every HF tensor with its shape. A tied output weight is no tensor of its own."""
    return {
        name: shape
        for op, layer, expert in placed_ops(architecture, family)
        for name, shape in zip(op.hf_names(layer, expert), op.hf_shapes(architecture), strict=True)
    }


def impossible_sizes(architecture: Architecture, num_tensors: int) -> list[str]:
    """Counts of config.json that no folder of so many tensors can have: found before so many of anything are made."""
    counts = {"num_hidden_layers": architecture.num_layers}
    if architecture.experts is not None:
        counts["num_experts (num_local_experts, n_routed_experts)"] = architecture.experts.num
    return [
        f"config.json says {name}={count}, but there are only {num_tensors} tensors; copy the folder again"
        for name, count in counts.items()
        if not 1 <= count <= num_tensors
    ]
