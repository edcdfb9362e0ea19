"""Which rank holds which tensor, and how do the shards of all ranks become HF tensors again?

`load_from_hf` fills the parameters of this rank's model chunks, and reads just the slices that it needs.
`export_to_hf` writes an HF folder: each pipeline stage, and each holder of experts, writes its own shard files in
parallel, and no rank ever holds more than one gathered tensor.

Left out: the operations themselves (`operations.py`), the files (`files.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.files import copy_companions
from megatron_powerflow.hf.operations import Op, ShardShape, TensorSource
from megatron_powerflow.hf.shapes import expected_tensors, is_embedding, is_output
from megatron_powerflow.hf.shard_files import PlannedFile, ShardWriter, TensorInfo, dtype_name, plan_files, write_index
from megatron_powerflow.hf.torch_dist_names import FUSED_NORMS
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.owner import Owner
from megatron_powerflow.parallel.together import attempt, gather_to_main, on_main, raise_together
from megatron_powerflow.targets import export_target

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlock

# Transformer Engine fuses a norm with the linear layer behind it and names the weight after the latter.
FUSED_NORM_NAMES = {fused.norm: norm for norm, fused in FUSED_NORMS.items()}
MAX_SHARD_BYTES = 5 * 10**9


class Chunk(Protocol):
    """A part of the model on this rank: a torch module with these parts of Megatron's GPTModel."""

    decoder: TransformerBlock
    padded_vocab_size: int

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Placement:
    """One local parameter, the operation that fills it, and the global layer and expert (from 0) that it belongs to.

    parameter: an nn.Parameter, or a plain Tensor for a buffer that is a part of the model and that no optimizer moves.
    layer, expert: None where it belongs to none.
    """

    parameter: Tensor
    op: Op
    layer: int | None
    expert: int | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The names of the parameter's HF tensors."""
        return self.op.hf_names(self.layer, self.expert)


def placements(chunks: Sequence[Chunk], family: Family, ep_rank: int) -> Iterator[Placement]:
    """Yield every parameter of this rank's chunks, chunk by chunk, and behind a chunk's parameters the buffers that an
    operation names. A parameter that no operation names is a bug, and an AssertionError."""
    layer_ops = {op.megatron: op for op in family.layer_ops}
    model_ops = {op.megatron: op for op in family.model_ops}
    for chunk in chunks:
        buffers = ((name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(tuple(layer_ops)))
        for name, parameter in chain(chunk.named_parameters(), buffers):
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
            if match is None:
                assert name in model_ops, f"no operation fills {name} in family {family.model_type}"
                yield Placement(parameter, model_ops[name], None)
                continue
            suffix = _as_an_expert_alone(FUSED_NORM_NAMES.get(match[2], match[2]))
            layer = chunk.decoder.layers[int(match[1])]
            expert = None
            if local := re.search(r"(?<=local_experts\.)\d+", suffix):
                expert = ep_rank * layer.mlp.num_local_experts + int(local[0])
                suffix = suffix[: local.start()] + "{expert}" + suffix[local.end() :]
            assert suffix in layer_ops, f"no operation fills {name} in family {family.model_type}"
            # layer_number counts from 1 over the whole model
            yield Placement(parameter, layer_ops[suffix], layer.layer_number - 1, expert)


def _as_an_expert_alone(name: str) -> str:
    """Return the name that a weight within a grouped product has where each expert is a module of its own; others stay.

    mlp.experts.linear_fc1.weight7 -> mlp.experts.local_experts.7.linear_fc1.weight; its shape and rows are the same.
    """
    return re.sub(r"^mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r"mlp.experts.local_experts.\2.\1.weight", name)


@torch.no_grad()
def load_from_hf(
    chunks: Sequence[Chunk], source: TensorSource, architecture: Architecture, family: Family, groups: Groups
) -> None:
    """Overwrite the parameters of `chunks` with the folder's numbers, cast to the parameters' dtype.

    Each rank reads its own slices only; nothing is collective.
    """
    shape = _shard_shape(chunks, architecture, groups)
    for placement in placements(chunks, family, groups.ep_rank):
        parameter, names = placement.parameter, placement.hf_names
        if architecture.tied_embeddings and is_output(placement.op):
            # the last stage's own copy of a tied embedding (pp > 1)
            names = next(op for op in family.model_ops if is_embedding(op)).hf_names(None)
        value = placement.op.shard(source, names, shape)
        if value.shape != parameter.shape:
            raise AssertionError(f"{names}: shard {tuple(value.shape)}, parameter {tuple(parameter.shape)}")
        parameter.copy_(value)


def exported_placements(
    chunks: Sequence[Chunk], architecture: Architecture, family: Family, groups: Groups
) -> Iterator[Placement]:
    """Yield the placements that this rank's part of an export is made of.

    A tied output weight is left out, for the first stage has it as the embedding. Beyond expert-parallel rank 0 only
    the experts come, because the other parameters are the same as on rank 0.
    """
    for placement in placements(chunks, family, groups.ep_rank):
        tied = architecture.tied_embeddings and is_output(placement.op)
        if not tied and not (groups.ep_rank and placement.expert is None):
            yield placement


@torch.no_grad()
def hf_tensors(
    chunks: Sequence[Chunk],
    architecture: Architecture,
    family: Family,
    groups: Groups,
    *,
    value_of: Callable[[Placement], Tensor] = lambda placement: placement.parameter.detach(),
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the HF tensors of this rank's stage, and gather one parameter at a time for them.

    The tensors are on the parameters' device and in their dtype. value_of: another tensor of a parameter's shape to
    gather in its place, such as its gradient. Collective over tp_group; only tensor-parallel rank 0 yields anything.
    """
    shape = _shard_shape(chunks, architecture, groups)
    for placement in exported_placements(chunks, architecture, family, groups):
        value = value_of(placement)
        shards = [value]
        if groups.tp_size > 1:
            shards = [torch.empty_like(value) for _ in range(groups.tp_size)]
            dist.all_gather(shards, value.contiguous(), group=groups.tp)
        if groups.tp_rank == 0:
            yield from zip(placement.hf_names, placement.op.merge(shards, shape), strict=True)


def export_to_hf(
    chunks: Sequence[Chunk],
    architecture: Architecture,
    family: Family,
    groups: Groups,
    *,
    companions: Path,
    out: Path,
    source: Path,
    more: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `out`, a plain HF folder, in the dtype of the parameters. Collective over all ranks.

    companions: the folder whose config, tokenizer, generation config and chat template are copied. source: what the
    export's mark names as its origin. more: file name -> text of further files, read on the main rank.
    max_shard_bytes: the most bytes of a shard file that holds several parameters.
    The folder appears under its name only when it is complete, and replaces an older export of that name. Raises
    UserError when `out` is something else, another process writes it or the disk fills up; `out` is then unchanged.
    """
    target = export_target(out)
    dtype = str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
    about: dict[str, Any] = {"source": str(source.resolve()), "dtype": dtype}

    def failure_message(text: str) -> str:
        return f"{out}: the export could not be written ({text}); free space on that disk and export again"

    with ExitStack() as stack:
        owner = stack.enter_context(Owner(target.out, target.lock, target.made_by))
        on_main(owner.take, groups)
        on_main(target.begin, groups)
        if groups.is_main:
            stack.callback(target.abandon)  # nothing is left of it behind `publish`
        failure = None
        if groups.is_main:
            failure = attempt(lambda: _write_companions(companions, target.partial, dtype, more or {}), OSError)
        raise_together(failure, failure_message, groups)

        planned_files: list[PlannedFile] = []
        if groups.edp_rank == 0:
            planned_files = planned_files_of(chunks, architecture, family, groups, max_shard_bytes)
            writer = ShardWriter(target.partial, planned_files)
            for name, tensor in hf_tensors(chunks, architecture, family, groups):
                if failure is None:  # after a failure only the gathers go on, for the ranks that wait in them
                    failure = attempt(partial(writer.add, name, tensor), OSError)
            writer.close() if failure is None else writer.abandon()
        raise_together(failure, failure_message, groups)

        gathered = gather_to_main(planned_files, groups)
        if gathered is not None:
            files = [file for files_of_rank in gathered for file in files_of_rank]
            file_of = {name: file.name for file in files for name in file.tensors}
            expected = expected_tensors(architecture, family)
            assert set(file_of) == set(expected), f"export differs: {sorted(set(file_of) ^ set(expected))[:5]}"
            total_bytes = sum(file.num_bytes for file in files)
            failure = attempt(lambda: write_index(target.partial, file_of, total_bytes), OSError)
            about |= {"num_bytes": total_bytes}
        raise_together(failure, failure_message, groups)
        on_main(lambda: target.publish(**about), groups)


def _write_companions(companions: Path, folder: Path, dtype: str, more: Mapping[str, str]) -> None:
    """Write the files that an export holds beside its weights. more: file name -> text of further files."""
    copy_companions(companions, folder, dtype=dtype)
    for name, text in more.items():
        (folder / name).write_text(text, encoding="utf-8")


def planned_files_of(
    chunks: Sequence[Chunk], architecture: Architecture, family: Family, groups: Groups, max_shard_bytes: int
) -> list[PlannedFile]:
    """Plan the files that this rank writes the tensors of `hf_tensors` to, in the order in which those are yielded."""
    shapes = expected_tensors(architecture, family)
    tensors = [
        {name: TensorInfo(dtype_name(placement.parameter.dtype), shapes[name]) for name in placement.hf_names}
        for placement in exported_placements(chunks, architecture, family, groups)
        if groups.tp_rank == 0
    ]
    return plan_files(tensors, max_shard_bytes, prefix=f"stage-{groups.pp_rank:05d}-{groups.ep_rank:05d}")


def _shard_shape(chunks: Sequence[Chunk], architecture: Architecture, groups: Groups) -> ShardShape:
    return ShardShape(architecture, groups.tp_rank, groups.tp_size, chunks[0].padded_vocab_size)
