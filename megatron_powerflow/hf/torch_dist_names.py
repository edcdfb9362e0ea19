"""Under which name, and at which place of which tensor, does a torch_dist checkpoint hold a parameter?

Megatron-Core stores global tensors, as one rank without any parallelism would hold them. All layers of a kind are one
tensor with the layer in front, [layers, ...], all experts one with both, [layers, experts, ...]:

    decoder.layers.3.mlp.linear_fc1.weight                         decoder.layers.mlp.linear_fc1.weight [3]
    decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight decoder.layers.mlp.experts.experts.linear_fc2.weight
                                                                   [3, 5]
    decoder.layers.3.input_layernorm.weight             decoder.layers.self_attention.linear_qkv.layer_norm_weight [3]

A norm has the name that Transformer Engine gives it where it is fused with the linear layer behind it; Megatron's local
layers take that name too. Before experts Transformer Engine fuses nothing and uses the norm's own name, so both stand
in what we write. Layers that differ from each other are stored apart, their number in the name.

Left out: files and bytes (`converter/torch_dist.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import Op, ShardShape
from megatron_powerflow.hf.shapes import placed_ops

# A norm's own name -> the name it has where it is fused with the linear layer behind it.
FUSED_NORMS = {
    "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight"),
    "pre_mlp_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight"),
}
FUSED_QKV = "self_attention.linear_qkv.weight"  # latent attention has none, and its local layers take no other name
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a global tensor: tensor[index]. lead: the sizes of the axes that `index` counts along."""

    key: str
    index: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """One parameter. places: where it may be, the usual one first; written: those that we write it to."""

    op: Op
    layer: int | None
    expert: int | None
    places: tuple[Place, ...]
    written: tuple[Place, ...]

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.op.hf_names(self.layer, self.expert)

    @property
    def fp32(self) -> bool:
        """It is in fp32 whatever is asked for."""
        return getattr(self.op, "fp32", False)


def stored_parameters(architecture: Architecture, family: Family) -> Iterator[Stored]:
    """Every parameter of the model once, in the order in which HF lists tensors."""
    parameters = list(placed_ops(architecture, family))
    names_of: dict[int | None, set[str]] = {}
    for op, layer, _ in parameters:
        names_of.setdefault(layer, set()).add(op.megatron)
    kinds = {frozenset(names) for layer, names in names_of.items() if layer is not None}
    for op, layer, expert in parameters:
        if layer is None:
            places: tuple[Place, ...] = (Place(op.megatron),)
            written = places
        else:
            names = _names_in_checkpoint(op, names_of[layer])
            stacked = tuple(_place(name, layer, expert, architecture, stacked=True) for name in names)
            apart = tuple(_place(name, layer, expert, architecture, stacked=False) for name in names)
            places = stacked + apart if len(kinds) == 1 else apart + stacked
            # both names where Transformer Engine's layers fuse a norm and the local ones do not, or the other way round
            fused = op.megatron in FUSED_NORMS and {FUSED_NORMS[op.megatron][1], FUSED_QKV} <= names_of[layer]
            written = places[:1] if fused else places[: len(names)]
        yield Stored(op, layer, expert, places, written)


def _names_in_checkpoint(op: Op, names_of_layer: set[str]) -> tuple[str, ...]:
    name = op.megatron.replace("local_experts.{expert}.", "experts.")
    return (FUSED_NORMS[name][0], name) if name in FUSED_NORMS else (name,)


def _place(name: str, layer: int, expert: int | None, architecture: Architecture, *, stacked: bool) -> Place:
    index, lead = ((layer,), (architecture.num_layers,)) if stacked else ((), ())
    if expert is not None:
        assert architecture.experts is not None, name
        index, lead = (*index, expert), (*lead, architecture.experts.num)
    return Place(f"decoder.layers.{name}" if stacked else f"decoder.layers.{layer}.{name}", index, lead)


def extra_states(parameters: Iterable[Stored]) -> list[str]:
    """Keys of the `_extra_state` that Megatron-Core asks of each linear layer and attention, of each layer and expert.

    FP8 scales live there; without them it holds nothing, but a model does not load where it is missing.
    """
    keys: dict[str, None] = {}
    for stored in parameters:
        name = stored.op.megatron.removesuffix(".weight")
        if stored.layer is None or name == stored.op.megatron or "linear_" not in name.rsplit(".", 1)[-1]:
            continue
        modules = [stored.written[0].key.removesuffix("weight")]
        if name == "self_attention.linear_proj":
            modules.append(modules[0].replace("linear_proj.", "core_attention."))
        index = ".".join(map(str, stored.written[0].index or (0,)))
        shape = ".".join(map(str, stored.written[0].lead or (1,)))
        keys |= dict.fromkeys(f"{module}_extra_state/shard_{index}_{shape}" for module in modules)
    return list(keys)


def parameter_shape(stored: Stored, architecture: Architecture, padded_vocab_size: int) -> tuple[int, ...]:
    """Of the whole parameter, as the operation would make it: it is played on tensors without memory."""
    source = _NoMemory(dict(zip(stored.hf_names, stored.op.hf_shapes(architecture), strict=True)))
    return tuple(stored.op.shard(source, stored.hf_names, whole(architecture, padded_vocab_size)).shape)


def whole(architecture: Architecture, padded_vocab_size: int) -> ShardShape:
    """The one rank of a model that is not cut."""
    return ShardShape(architecture, 0, 1, padded_vocab_size)


@dataclass(frozen=True, slots=True)
class _NoMemory:
    """A TensorSource of tensors that have a shape and nothing else."""

    shapes: dict[str, tuple[int, ...]]

    def read(self, name, *, rows=None, columns=None):
        import torch

        part = torch.empty(self.shapes[name], device="meta")
        part = part if rows is None else part[slice(*rows)]
        return part if columns is None else part[:, slice(*columns)]
