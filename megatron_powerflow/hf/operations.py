"""How does one Megatron parameter relate to Hugging Face tensors, in both directions?

A family is a list of these operations. Each one can `shard`, which reads just the slices of one tensor-parallel
rank from the HF side, and `merge`, which turns the shards of all ranks back into HF tensors. For every operation and
every size, `merge([shard(rank) for rank in range(size)])` gives back what was read, bit for bit.

Left out: which file a tensor is in (`files.py`), which rank holds which layer (`live_weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from megatron_powerflow.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


def _required(part: T | None) -> T:
    """Return an optional part of the architecture, which a family has whose operations count by it."""
    assert part is not None
    return part


# Word by which operations state a size -> the size, for words that are no fields of an Architecture.
WIDTHS: dict[str, Callable[[Architecture], int]] = {
    "attention": lambda a: a.num_attention_heads * (a.mla.v_head_dim if a.mla else a.head_dim),
    "ffn": lambda a: a.ffn_hidden_size,
    "queries": lambda a: a.num_attention_heads * a.head_dim,
    "q_latent": lambda a: _required(_required(a.mla).q_lora_rank),
    "kv_latent": lambda a: _required(a.mla).kv_lora_rank,
    "kv_latent_and_rope": lambda a: _required(a.mla).kv_lora_rank + _required(a.mla).rope_head_dim,
    "keys_and_values": lambda a: a.num_attention_heads * (_required(a.mla).nope_head_dim + _required(a.mla).v_head_dim),
    "experts": lambda a: _required(a.experts).num,
    "dense_ffn": lambda a: _required(_required(a.experts).dense_ffn_hidden_size),
    "shared_ffn": lambda a: _required(_required(a.experts).shared_ffn_hidden_size),
}


def width(architecture: Architecture, word: str) -> int:
    """Return the size that an operation's data calls `word`: one of WIDTHS, or a field of the architecture."""
    return WIDTHS[word](architecture) if word in WIDTHS else getattr(architecture, word)


class TensorSource(Protocol):
    """A source of HF tensors, read by name and range. `rows` and `columns` are half-open (start, stop); None: all."""

    def read(self, name: str, *, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """Read a slice of a tensor, on CPU, in the dtype in which it is stored."""
        ...


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate the parts along `dim`. A single part is returned as it is, without a copy."""
    import torch

    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


class Op(Protocol):
    """The relation between one Megatron parameter and its HF tensors.

    megatron: the parameter's name within its layer or the model. HF names contain {layer}, the global layer from 0.
    Where each expert has a tensor of its own, both names contain {expert}, its global number from 0.
    """

    @property
    def megatron(self) -> str: ...

    def hf_names(self, layer: int | None, expert: int | None = None) -> tuple[str, ...]:
        """Return the names of the parameter's HF tensors."""
        ...

    def hf_shapes(self, architecture: Architecture) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of those tensors, in the order of `hf_names`."""
        ...

    def shard(self, source: TensorSource, names: Sequence[str], shape: ShardShape) -> Tensor:
        """Read one rank's part of the parameter. names: those of `hf_names`."""
        ...

    def merge(self, shards: Sequence[Tensor], shape: ShardShape) -> tuple[Tensor, ...]:
        """Return the HF tensors, in the order of `hf_names`. shards: the parameter's part on each tp rank, in order."""
        ...


@dataclass(frozen=True)
class ShardShape:
    """What an operation needs to know of the model and of the tensor-parallel rank that it reads for."""

    architecture: Architecture
    tp_rank: int
    tp_size: int
    # vocabulary rows on all ranks together, padding included
    padded_vocab_size: int

    def part(self, size: int) -> tuple[int, int]:
        """Return this rank's half-open (start, stop) of a dimension of `size`, which tp_size divides."""
        assert size % self.tp_size == 0, f"tp={self.tp_size} does not divide {size}; layout checks let it through"
        step = size // self.tp_size
        return self.tp_rank * step, (self.tp_rank + 1) * step


@dataclass(frozen=True)
class Replicated:
    """A parameter that is the same on every rank: a norm's weight [size], or a small matrix [rows, size].

    size, rows: words that `width` knows. fp32: the tensor stays in fp32, whatever dtype the model has or gets.
    """

    megatron: str
    hf: str
    size: str = "hidden_size"
    rows: str | None = None
    fp32: bool = False

    def hf_names(self, layer, expert=None):
        return (self.hf.format(layer=layer, expert=expert),)

    def hf_shapes(self, architecture):
        return (tuple(width(architecture, word) for word in (self.rows, self.size) if word is not None),)

    def shard(self, source, names, shape):
        return source.read(names[0])

    def merge(self, shards, shape):
        return (shards[0],)


@dataclass(frozen=True)
class Columns:
    """A column-parallel weight [outputs, inputs]: each rank holds an equal part of its rows, and whole heads.

    outputs, inputs: words that `width` knows.
    """

    megatron: str
    hf: str
    outputs: str
    inputs: str = "hidden_size"

    def hf_names(self, layer, expert=None):
        return (self.hf.format(layer=layer, expert=expert),)

    def hf_shapes(self, architecture):
        return ((width(architecture, self.outputs), width(architecture, self.inputs)),)

    def shard(self, source, names, shape):
        return source.read(names[0], rows=shape.part(width(shape.architecture, self.outputs)))

    def merge(self, shards, shape):
        return (joined(shards, 0),)


@dataclass(frozen=True)
class Rows:
    """A row-parallel weight [hidden_size, inputs]: each rank holds an equal part of its columns.

    inputs: a word that `width` knows.
    """

    megatron: str
    hf: str
    inputs: str

    def hf_names(self, layer, expert=None):
        return (self.hf.format(layer=layer, expert=expert),)

    def hf_shapes(self, architecture):
        return ((architecture.hidden_size, width(architecture, self.inputs)),)

    def shard(self, source, names, shape):
        return source.read(names[0], columns=shape.part(width(shape.architecture, self.inputs)))

    def merge(self, shards, shape):
        return (joined(shards, 1),)


@dataclass(frozen=True)
class GateUp:
    """The first weight of a gated MLP: Megatron holds each rank's rows [gate; up] in one weight, HF holds two weights.

    gate, up: the HF names. outputs: a word that `width` knows, the rows of each of the two.
    """

    megatron: str
    gate: str
    up: str
    outputs: str = "ffn"

    def hf_names(self, layer, expert=None):
        return (self.gate.format(layer=layer, expert=expert), self.up.format(layer=layer, expert=expert))

    def hf_shapes(self, architecture):
        return ((width(architecture, self.outputs), architecture.hidden_size),) * 2

    def shard(self, source, names, shape):
        import torch

        rows = shape.part(width(shape.architecture, self.outputs))
        return torch.cat([source.read(name, rows=rows) for name in names], dim=0)

    def merge(self, shards, shape):
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return joined([half[0] for half in halves], 0), joined([half[1] for half in halves], 0)


@dataclass(frozen=True)
class Qkv:
    """The weight or bias that makes queries, keys and values. HF holds q, k and v apart; Megatron interleaves them by
    query group, so that a split of the rows over ranks hands each rank whole groups:

    [q of group 0 (heads/groups * head_dim rows), k of group 0, v of group 0, q of group 1, ...]

    With more ranks than groups, each rank has an equal part of one group's rows, which may begin among its q and end
    among its v. Megatron's attention then puts the products of these parts together, so no row is on two ranks.
    """

    megatron: str
    q: str
    k: str
    v: str

    def hf_names(self, layer, expert=None):
        return tuple(name.format(layer=layer, expert=expert) for name in (self.q, self.k, self.v))

    def hf_shapes(self, architecture):
        tail = () if self.megatron.endswith("bias") else (architecture.hidden_size,)
        q_rows = architecture.num_attention_heads * architecture.head_dim
        kv_rows = architecture.num_query_groups * architecture.head_dim
        return ((q_rows, *tail), (kv_rows, *tail), (kv_rows, *tail))

    def shard(self, source, names, shape):
        import torch

        num_groups, head_dim = shape.architecture.num_query_groups, shape.architecture.head_dim
        per_group = shape.architecture.num_attention_heads // num_groups
        rows_per_group = (per_group * head_dim, head_dim, head_dim)
        if shape.tp_size > num_groups:
            return self._part_of_group(source, names, shape, rows_per_group)
        first, last = shape.part(num_groups)
        parts = [
            source.read(name, rows=(first * rows, last * rows)).unflatten(0, (last - first, rows))
            for name, rows in zip(names, rows_per_group, strict=True)
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def _part_of_group(self, source, names, shape, rows_per_group):
        """Read the rows of a rank that has less than a group. rows_per_group: those of q, k and v."""
        num_groups, block = shape.architecture.num_query_groups, sum(rows_per_group)
        start, stop = shape.part(num_groups * block)
        group, begin = start // block, 0
        parts = []
        for name, rows in zip(names, rows_per_group, strict=True):
            first = max(start - group * block - begin, 0)
            last = min(stop - group * block - begin, rows)
            if first < last:
                parts.append(source.read(name, rows=(group * rows + first, group * rows + last)))
            begin += rows
        return joined(parts, 0)

    def merge(self, shards, shape):
        architecture, head_dim = shape.architecture, shape.architecture.head_dim
        per_group = architecture.num_attention_heads // architecture.num_query_groups
        whole = joined(shards, 0).unflatten(0, (architecture.num_query_groups, -1))
        return tuple(part.flatten(0, 1) for part in whole.split([per_group * head_dim, head_dim, head_dim], dim=1))


@dataclass(frozen=True)
class Fused:
    """A parameter whose HF tensors are the row blocks of a single one: [q; k; v] of a Qkv, [gate; up] of a GateUp.

    parts: the operation whose tensors stand behind each other; hf: the name of the tensor that holds them.
    """

    parts: Op
    hf: str

    @property
    def megatron(self) -> str:
        return self.parts.megatron

    def hf_names(self, layer, expert=None):
        return (self.hf.format(layer=layer, expert=expert),)

    def hf_shapes(self, architecture):
        shapes = self.parts.hf_shapes(architecture)
        return ((sum(shape[0] for shape in shapes), *shapes[0][1:]),)

    def shard(self, source, names, shape):
        starts, total = {}, 0
        part_names = self.parts.hf_names(None)
        for part, part_shape in zip(part_names, self.parts.hf_shapes(shape.architecture), strict=True):
            starts[part], total = total, total + part_shape[0]
        return self.parts.shard(_RowsOf(source, names[0], starts), part_names, shape)

    def merge(self, shards, shape):
        import torch

        return (torch.cat(self.parts.merge(shards, shape), dim=0),)


@dataclass(frozen=True)
class _RowsOf:
    """A TensorSource of the row blocks of one tensor. starts: a block's name -> the row at which it begins."""

    source: TensorSource
    name: str
    starts: Mapping[str, int]

    def read(self, name, *, rows=None, columns=None):
        first = self.starts[name]
        return self.source.read(self.name, rows=(first + rows[0], first + rows[1]), columns=columns)


@dataclass(frozen=True)
class VocabRows:
    """The embedding or output weight [vocabulary, hidden_size]: each rank holds an equal part of its rows.

    Megatron's rows are padded with zeros to padded_vocab_size, which tp divides; HF's are not.
    """

    megatron: str
    hf: str

    def hf_names(self, layer, expert=None):
        return (self.hf,)

    def hf_shapes(self, architecture):
        return ((architecture.vocab_size, architecture.hidden_size),)

    def shard(self, source, names, shape):
        import torch

        vocab_size = shape.architecture.vocab_size
        start, stop = shape.part(shape.padded_vocab_size)
        real = source.read(names[0], rows=(min(start, vocab_size), min(stop, vocab_size)))
        padding = real.new_zeros((stop - start - real.shape[0], real.shape[1]))
        return torch.cat([real, padding], dim=0) if padding.shape[0] else real

    def merge(self, shards, shape):
        return (joined(shards, 0)[: shape.architecture.vocab_size],)


@dataclass(frozen=True)
class InLayers:
    """An operation whose tensors only some layers have. layers: architecture -> the numbers of those layers, from 0."""

    op: Op
    layers: Callable[[Architecture], range]

    @property
    def megatron(self):
        return self.op.megatron

    @property
    def fp32(self):
        return getattr(self.op, "fp32", False)

    def hf_names(self, layer, expert=None):
        return self.op.hf_names(layer, expert)

    def hf_shapes(self, architecture):
        return self.op.hf_shapes(architecture)

    def shard(self, source, names, shape):
        return self.op.shard(source, names, shape)

    def merge(self, shards, shape):
        return self.op.merge(shards, shape)
