"""Which rank holds which tensor, and how do the shards of all ranks become HF tensors again?

`load_from_hf` fills the parameters of this rank's model chunks from just the slices it needs.
`export_to_hf` writes an HF folder: each pipeline stage, and each holder of experts, its own shard files, in
parallel, no rank ever holding more than one gathered tensor.

Left out: the operations themselves (`operations.py`), the files (`files.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
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
from megatron_powerflow.hf.files import SafetensorsFolder, copy_companions
from megatron_powerflow.hf.operations import Op, ShardShape
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
FUSED_NORM_NAMES = {fused: own for own, (fused, _) in FUSED_NORMS.items()}
MAX_SHARD_BYTES = 5 * 10**9


class Chunk(Protocol):
    """What is asked of a part of the model: a torch module with these parts of Megatron's GPTModel."""

    decoder: TransformerBlock
    padded_vocab_size: int

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class Placement:
    """One local parameter, the operation that fills it, the global layer and expert it belongs to (None: to none).

    A buffer that is a part of the model, and that no optimizer moves, is a Tensor and no nn.Parameter.
    """

    parameter: Tensor
    op: Op
    layer: int | None
    expert: int | None = None

    @property
    def hf_names(self) -> tuple[str, ...]:
        return self.op.hf_names(self.layer, self.expert)


def placements(chunks: Sequence[Chunk], family: Family, ep_rank: int) -> Iterator[Placement]:
    """Every parameter of this rank's chunks, in order; one that no operation names is a bug. Then the buffers that one
    names."""
    layer_ops = {op.megatron: op for op in family.layer_ops}
    model_ops = {op.megatron: op for op in family.model_ops}
    for chunk in chunks:
        buffers = ((name, it) for name, it in chunk.named_buffers() if name.endswith(tuple(layer_ops)))
        for name, parameter in chain(chunk.named_parameters(), buffers):
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
            if match is None:
                assert name in model_ops, f"no operation fills {name} in family {family.model_type}"
                yield Placement(parameter, model_ops[name], None)
                continue
            suffix = FUSED_NORM_NAMES.get(match[2], match[2])
            layer = chunk.decoder.layers[int(match[1])]
            expert = None
            if local := re.search(r"(?<=local_experts\.)\d+", suffix):
                expert = ep_rank * layer.mlp.num_local_experts + int(local[0])
                suffix = suffix[: local.start()] + "{expert}" + suffix[local.end() :]
            assert suffix in layer_ops, f"no operation fills {name} in family {family.model_type}"
            # layer_number counts from 1 over the whole model
            yield Placement(parameter, layer_ops[suffix], layer.layer_number - 1, expert)


@torch.no_grad()
def load_from_hf(
    chunks: Sequence[Chunk], source: SafetensorsFolder, architecture: Architecture, family: Family, groups: Groups
) -> None:
    """Fill the parameters of `chunks` in place, casting to their dtype. Reads this rank's slices only."""
    shape = _shard_shape(chunks, architecture, groups)
    for placed in placements(chunks, family, groups.ep_rank):
        names = placed.hf_names
        if architecture.tied_embeddings and is_output(placed.op):
            # the last stage's own copy of a tied embedding (pp > 1)
            names = next(op for op in family.model_ops if is_embedding(op)).hf_names(None)
        value = placed.op.shard(source, names, shape)
        if value.shape != placed.parameter.shape:
            raise AssertionError(f"{names}: shard {tuple(value.shape)}, parameter {tuple(placed.parameter.shape)}")
        placed.parameter.copy_(value)


def exported_placements(
    chunks: Sequence[Chunk], architecture: Architecture, family: Family, groups: Groups
) -> Iterator[Placement]:
    """Those that this rank's part of an export is made of. A tied output weight belongs to the first stage and is left
    out; beyond expert-parallel rank 0 only the experts come, for the rest is the same there."""
    for placed in placements(chunks, family, groups.ep_rank):
        tied = architecture.tied_embeddings and is_output(placed.op)
        if not tied and not (groups.ep_rank and placed.expert is None):
            yield placed


@torch.no_grad()
def hf_tensors(
    chunks: Sequence[Chunk], architecture: Architecture, family: Family, groups: Groups
) -> Iterator[tuple[str, Tensor]]:
    """HF tensors of this rank's stage, one parameter gathered at a time. Collective over tp_group.

    Yields on tensor-parallel rank 0; the other ranks only take part.
    """
    shape = _shard_shape(chunks, architecture, groups)
    for placed in exported_placements(chunks, architecture, family, groups):
        shards = [placed.parameter.detach()]
        if groups.tp_size > 1:
            shards = [torch.empty_like(placed.parameter) for _ in range(groups.tp_size)]
            dist.all_gather(shards, placed.parameter.detach().contiguous(), group=groups.tp)
        if groups.tp_rank == 0:
            yield from zip(placed.hf_names, placed.op.merge(shards, shape), strict=True)


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

    companions: folder whose config, tokenizer, generation config and chat template go along. source: what the mark says
    that it is an export of. more: texts by file name, on the main rank, that go along. The folder appears under its
    name only when it is complete; an older export there is replaced. Raises UserError when something else is there,
    another process writes it or the disk fills up; nothing of `out` is lost then.
    """
    target = export_target(out)
    dtype = str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
    about: dict[str, Any] = {"source": str(source.resolve()), "dtype": dtype}

    def say(text: str) -> str:
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
        raise_together(failure, say, groups)

        mine: list[PlannedFile] = []
        if groups.edp_rank == 0:
            mine = _planned_files(chunks, architecture, family, groups, max_shard_bytes)
            writer = ShardWriter(target.partial, mine)
            for name, tensor in hf_tensors(chunks, architecture, family, groups):
                if failure is None:  # after a failure only the gathers go on, for the ranks that wait in them
                    failure = attempt(partial(writer.add, name, tensor), OSError)
            writer.close() if failure is None else writer.abandon()
        raise_together(failure, say, groups)

        gathered = gather_to_main(mine, groups)
        if gathered is not None:
            files = [file for part in gathered for file in part]
            everything = {name: file.name for file in files for name in file.tensors}
            expected = expected_tensors(architecture, family)
            assert set(everything) == set(expected), f"export differs: {sorted(set(everything) ^ set(expected))[:5]}"
            total_bytes = sum(file.num_bytes for file in files)
            failure = attempt(lambda: write_index(target.partial, everything, total_bytes), OSError)
            about |= {"num_bytes": total_bytes}
        raise_together(failure, say, groups)
        on_main(lambda: target.publish(**about), groups)


def _write_companions(companions: Path, folder: Path, dtype: str, more: Mapping[str, str]) -> None:
    """What an export holds beside its weights."""
    copy_companions(companions, folder, dtype=dtype)
    for name, text in more.items():
        (folder / name).write_text(text, encoding="utf-8")


def _planned_files(
    chunks: Sequence[Chunk], architecture: Architecture, family: Family, groups: Groups, max_shard_bytes: int
) -> list[PlannedFile]:
    """The files that this rank writes of what `hf_tensors` yields to it, in that order."""
    shapes = expected_tensors(architecture, family)
    tensors = [
        {name: TensorInfo(dtype_name(placed.parameter.dtype), shapes[name]) for name in placed.hf_names}
        for placed in exported_placements(chunks, architecture, family, groups)
        if groups.tp_rank == 0
    ]
    return plan_files(tensors, max_shard_bytes, prefix=f"stage-{groups.pp_rank:05d}-{groups.ep_rank:05d}")


def _shard_shape(chunks: Sequence[Chunk], architecture: Architecture, groups: Groups) -> ShardShape:
    return ShardShape(architecture, groups.tp_rank, groups.tp_size, chunks[0].padded_vocab_size)
