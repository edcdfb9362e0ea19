"""Under which name, and in which slice of which tensor, does a torch_dist checkpoint hold a parameter?

Megatron-Core stores global tensors, as one rank without any parallelism would hold them. The parameters of one name in
all layers are one tensor with the layer in front, [layers, ...], and those of all experts one with both in front,
[layers, experts, ...]:

    decoder.layers.3.mlp.linear_fc1.weight                         decoder.layers.mlp.linear_fc1.weight [3]
    decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight decoder.layers.mlp.experts.experts.linear_fc2.weight
                                                                   [3, 5]
    decoder.layers.3.input_layernorm.weight             decoder.layers.self_attention.linear_qkv.layer_norm_weight [3]

A norm has the name that Transformer Engine gives it where it is fused with the linear layer behind it; Megatron's local
layers take that name too. Before experts Transformer Engine fuses nothing and uses the norm's own name, so we write the
norm under both names. Layers that differ from each other are stored apart, with their number in the name.

Left out: files and bytes (`converter/torch_dist.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import Op, ShardShape
from megatron_powerflow.hf.shapes import placed_ops


class FusedNorm(NamedTuple):
    """The names, within a layer, of a norm that is fused with a linear layer, and of that layer's weight."""

    norm: str
    linear: str


# A norm's own name -> the names where it is fused with the linear layer behind it.
FUSED_NORMS = {
    "input_layernorm.weight": FusedNorm(
        "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight"
    ),
    "pre_mlp_layernorm.weight": FusedNorm("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight"),
}
# Latent attention has no such weight, and its local layers take the norms' own names only.
FUSED_QKV = "self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class StoredSlice:
    """The part of the checkpoint's global tensor `key` that holds a parameter: tensor[index].

    index: along the leading axes, of which `lead` are the sizes; both empty where the tensor holds one parameter.
    """

    key: str
    index: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """A parameter of the model and where a checkpoint has it.

    op, layer, expert: as in `PlacedOp`. slices: those that may hold it, the usual one first. written_slices: those that
    we write it to.
    """

    op: Op
    layer: int | None
    expert: int | None
    slices: tuple[StoredSlice, ...]
    written_slices: tuple[StoredSlice, ...]

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The names of the parameter's HF tensors."""
        return self.op.hf_names(self.layer, self.expert)

    @property
    def fp32(self) -> bool:
        """Whether the parameter stays in fp32, whatever dtype a conversion asks for."""
        return getattr(self.op, "fp32", False)


def stored_parameters(architecture: Architecture, family: Family) -> Iterator[StoredParameter]:
    """Yield every parameter of the model once, in the order in which HF lists tensors."""
    parameters = list(placed_ops(architecture, family))
    names_of: dict[int | None, set[str]] = {}
    for op, layer, _ in parameters:
        names_of.setdefault(layer, set()).add(op.megatron)
    kinds = {frozenset(names) for layer, names in names_of.items() if layer is not None}
    for op, layer, expert in parameters:
        if layer is None:
            slices: tuple[StoredSlice, ...] = (StoredSlice(op.megatron),)
            written_slices = slices
        else:
            names = _names_in_checkpoint(op, names_of[layer])
            stacked = tuple(_slice(name, layer, expert, architecture, stacked=True) for name in names)
            apart = tuple(_slice(name, layer, expert, architecture, stacked=False) for name in names)
            slices = stacked + apart if len(kinds) == 1 else apart + stacked
            # both names where Transformer Engine's layers fuse a norm and the local ones do not, or the other way round
            fused = op.megatron in FUSED_NORMS and {FUSED_NORMS[op.megatron].linear, FUSED_QKV} <= names_of[layer]
            written_slices = slices[:1] if fused else slices[: len(names)]
        yield StoredParameter(op, layer, expert, slices, written_slices)


def _names_in_checkpoint(op: Op, names_of_layer: set[str]) -> tuple[str, ...]:
    """Return the names within a layer that a parameter may have: for a norm the fused one first, then its own."""
    name = op.megatron.replace("local_experts.{expert}.", "experts.")
    return (FUSED_NORMS[name].norm, name) if name in FUSED_NORMS else (name,)


def _slice(name: str, layer: int, expert: int | None, architecture: Architecture, *, stacked: bool) -> StoredSlice:
    """Return a parameter's slice. name: within its layer. stacked: whether all layers are in one tensor."""
    index, lead = ((layer,), (architecture.num_layers,)) if stacked else ((), ())
    if expert is not None:
        assert architecture.experts is not None, name
        index, lead = (*index, expert), (*lead, architecture.experts.num)
    return StoredSlice(f"decoder.layers.{name}" if stacked else f"decoder.layers.{layer}.{name}", index, lead)


def extra_states(parameters: Iterable[StoredParameter]) -> list[str]:
    """Return the keys of the `_extra_state` objects that Megatron-Core demands for each linear layer and attention.

    There is one for each layer and expert. It holds FP8 scales, and without FP8 nothing, but a model does not load from
    a checkpoint that lacks it.
    """
    keys: dict[str, None] = {}
    for stored in parameters:
        name = stored.op.megatron.removesuffix(".weight")
        if stored.layer is None or name == stored.op.megatron or "linear_" not in name.rsplit(".", 1)[-1]:
            continue
        modules = [stored.written_slices[0].key.removesuffix("weight")]
        if name == "self_attention.linear_proj":
            modules.append(modules[0].replace("linear_proj.", "core_attention."))
        index = ".".join(map(str, stored.written_slices[0].index or (0,)))
        shape = ".".join(map(str, stored.written_slices[0].lead or (1,)))
        keys |= dict.fromkeys(f"{module}_extra_state/shard_{index}_{shape}" for module in modules)
    return list(keys)


def parameter_shape(stored: StoredParameter, architecture: Architecture, padded_vocab_size: int) -> tuple[int, ...]:
    """Return the shape of the whole parameter. The operation itself makes it, of tensors without memory."""
    source = _MetaSource(dict(zip(stored.hf_names, stored.op.hf_shapes(architecture), strict=True)))
    return tuple(stored.op.shard(source, stored.hf_names, whole(architecture, padded_vocab_size)).shape)


def whole(architecture: Architecture, padded_vocab_size: int) -> ShardShape:
    """Return the shard of a model that is not cut: that of its only rank."""
    return ShardShape(architecture, 0, 1, padded_vocab_size)


@dataclass(frozen=True, slots=True)
class _MetaSource:
    """A TensorSource of tensors that have a shape and no numbers. shapes: by HF name."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name, *, rows=None, columns=None):
        import torch

        part = torch.empty(self.shapes[name], device="meta")
        part = part if rows is None else part[slice(*rows)]
        return part if columns is None else part[:, slice(*columns)]
