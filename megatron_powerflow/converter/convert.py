"""How does a Hugging Face folder become a torch_dist checkpoint, and back, tensor by tensor?

Both directions play the family's one list of operations (`hf/operations.py`), one parameter at a time, and write

    OUT/latest_checkpointed_iteration.txt   "release": what Megatron-LM's --load looks for
    OUT/release/                            torch_dist: .metadata, metadata.json, common.pt, __<rank>_0.distcp
    OUT/hf/                                 the source's config.json, tokenizer, generation config, chat template
    OUT/conversion.json                     where it came from

or a plain HF folder with a conversion.json in it. Everything happens in OUT.partial, which gets its name when it is
whole and on the disk (`targets.py`): a conversion that was killed leaves no folder that looks finished.

Left out: going on with a conversion that was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError

from megatron_powerflow.checkpoint.folder import HF_NAME, RELEASE_NAME, TRACKER_NAME, keeps_of
from megatron_powerflow.converter.compare import CARD_NAME, Comparison, compare, write_card
from megatron_powerflow.converter.model_folders import HfModel, MegatronModel, Model, open_model_folder
from megatron_powerflow.converter.ranks import Ranks
from megatron_powerflow.converter.read_ahead import ReadAhead
from megatron_powerflow.converter.torch_dist import PlannedChunk, write_frame, write_tensors
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_json
from megatron_powerflow.hf.files import FLOATS, copy_companions
from megatron_powerflow.hf.shard_files import (
    PlannedFile,
    ShardFile,
    TensorInfo,
    dtype_name,
    plan_files,
    torch_dtype,
    write_index,
)
from megatron_powerflow.hf.torch_dist_names import (
    StoredParameter,
    StoredSlice,
    extra_states,
    parameter_shape,
    stored_parameters,
)
from megatron_powerflow.metrics.provenance import provenance
from megatron_powerflow.parallel.layout import padded_vocab_size
from megatron_powerflow.parallel.owner import Owner
from megatron_powerflow.targets import TargetFolder, require

MADE_BY = "conversion"
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}  # what the command lines call them -> safetensors' names

BytesCallback = Callable[[int], object]  # called with numbers of bytes
Kind = TypeVar("Kind", HfModel, MegatronModel)


def _ignore_bytes(num_bytes: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class ConversionRequest:
    """What a conversion is asked for. dtype: fp32, bf16, fp16, or None to keep the source's. step: which checkpoint
    of a run, None is the latest. revisions: name on the hub -> commit, of a source that came from there."""

    source: Path
    out: Path
    dtype: str | None = None
    max_shard_bytes: int = 5 * 10**9
    step: int | None = None
    overwrite: bool = False
    verify: bool = False
    command: str = ""
    revisions: Mapping[str, str] = field(default_factory=dict)


def hf_to_megatron(
    request: ConversionRequest,
    ranks: Ranks,
    advance: BytesCallback = _ignore_bytes,
    announce: BytesCallback = _ignore_bytes,
) -> Comparison | None:
    """Write a torch_dist checkpoint that any layout loads. Returns the comparison if request.verify, else None.

    announce: called once with the bytes this rank will write; advance: with those it has just written. Collective.
    Raises UserError with everything that is wrong with the source, or when the disk cannot take it.
    """
    model = ranks.together(lambda: _open_source(request, ranks, HfModel))
    padded = padded_vocab_size(model.architecture, 1)
    parameter_of: dict[StoredSlice, StoredParameter] = {}
    chunks: list[PlannedChunk] = []
    shape_of: dict[str, tuple[int, ...]] = {}
    parameters = list(stored_parameters(model.architecture, model.family))
    for stored in parameters:
        if stored.op.megatron not in shape_of:
            shape_of[stored.op.megatron] = parameter_shape(stored, model.architecture, padded)
        dtype = torch_dtype(_one_dtype(model, stored, request.dtype))
        for slice_ in stored.written_slices:
            parameter_of[slice_] = stored
            chunks.append(PlannedChunk(slice_, shape_of[stored.op.megatron], dtype))
    my_share = ranks.share(chunks, lambda chunk: chunk.num_bytes)
    dtype_of = {chunk.slice_: chunk.dtype for chunk in my_share}
    announce(sum(chunk.num_bytes for chunk in my_share))

    def read(slice_: StoredSlice) -> torch.Tensor:
        return model.parameter(parameter_of[slice_], padded).to(dtype_of[slice_])

    def write(folder: Path) -> None:
        ahead = ReadAhead(read, [chunk.slice_ for chunk in my_share])

        def make(slice_: StoredSlice) -> torch.Tensor:
            tensor = ahead(slice_)
            advance(tensor.nbytes)
            return tensor

        try:
            write_tensors(folder, my_share, make, extra_states(parameters) if ranks.is_main else [], ranks.size)
        finally:
            ahead.close()

    with _published(request, model, ranks, sum(chunk.num_bytes for chunk in chunks)) as partial:
        if ranks.is_main:
            (partial / RELEASE_NAME).mkdir()
        ranks.gather(None)
        _writing(ranks, request.out, lambda: write(partial / RELEASE_NAME))
        if ranks.is_main:
            write_frame(partial / RELEASE_NAME)
            _copy_companions(
                model,
                partial / HF_NAME,
                {dtype_name(chunk.dtype) for chunk in chunks if not parameter_of[chunk.slice_].fp32},
            )
            (partial / TRACKER_NAME).write_text("release", encoding="utf-8")
        return _verify(request, model, partial, ranks)


def megatron_to_hf(
    request: ConversionRequest,
    ranks: Ranks,
    advance: BytesCallback = _ignore_bytes,
    announce: BytesCallback = _ignore_bytes,
) -> Comparison | None:
    """Write a plain HF folder, each rank files of its own. Returns the comparison if request.verify, else None.

    announce, advance and errors are as for `hf_to_megatron`. Collective.
    """
    model = ranks.together(lambda: _open_source(request, ranks, MegatronModel))
    parameters = list(stored_parameters(model.architecture, model.family))
    groups = [
        {
            name: TensorInfo(
                DTYPES["fp32" if stored.fp32 else request.dtype] if request.dtype else info.dtype, info.shape
            )
            for name, info in model.info(stored).items()
        }
        for stored in parameters
    ]
    files = plan_files(groups, request.max_shard_bytes)

    def read(number: int) -> dict[str, torch.Tensor]:
        tensors = model.read(parameters[number])
        return {name: tensor.to(torch_dtype(groups[number][name].dtype)) for name, tensor in tensors.items()}

    def write_file(file: PlannedFile, partial: Path) -> None:
        shard, ahead = ShardFile(partial / file.name, file.tensors), ReadAhead(read, file.groups)
        try:
            for number in file.groups:
                for name, tensor in ahead(number).items():
                    shard.add(name, tensor)
                    advance(tensor.nbytes)
            shard.close()
        finally:
            ahead.close()
            shard.abandon()

    def write_files(my_share: Sequence[PlannedFile], partial: Path) -> None:
        for file in my_share:
            write_file(file, partial)

    with _published(request, model, ranks, sum(file.num_bytes for file in files)) as partial:
        my_share = ranks.share(files, lambda file: file.num_bytes)
        announce(sum(file.num_bytes for file in my_share))
        _writing(ranks, request.out, lambda: write_files(my_share, partial))
        if ranks.is_main:
            usual = [group for stored, group in zip(parameters, groups, strict=True) if not stored.fp32]
            _copy_companions(model, partial, {info.dtype for group in usual for info in group.values()})
            write_index(
                partial,
                {name: file.name for file in files for name in file.tensors},
                sum(file.num_bytes for file in files),
            )
        return _verify(request, model, partial, ranks)


def _open_source(request: ConversionRequest, ranks: Ranks, kind: type[Kind]) -> Kind:
    """Open the source, which must be of the kind that this direction starts from, once `out` may be written."""
    _check_out(request)
    model = open_model_folder(request.source, ranks, step=request.step)
    if isinstance(model, kind):
        return model
    if kind is HfModel:
        raise UserError(f"{request.source}: a Megatron checkpoint already; give a Hugging Face folder")
    raise UserError(f"{request.source}: a Hugging Face folder already; give a run's folder or a checkpoint")


def _check_out(request: ConversionRequest) -> None:
    target, keeps = TargetFolder(request.out, MADE_BY), keeps_of(request.source, request.step)
    require(target.refusals(apart_from=(request.source, *keeps.apart_from), not_over=keeps.not_over))
    if target.is_there() and not request.overwrite:
        raise UserError(f"--out {request.out}: exists; give another folder, or --overwrite to replace it when done")


def _one_dtype(model: HfModel, stored: StoredParameter, dtype: str | None) -> str:
    """Return safetensors' name of the dtype that the parameter will have."""
    if stored.fp32:
        return DTYPES["fp32"]
    if dtype is not None:
        return DTYPES[dtype]
    dtypes = {name: info.dtype for name, info in model.info(stored).items()}
    if len(set(dtypes.values())) > 1:
        raise UserError(f"{model.path}: tensors {dtypes} become one parameter and differ in dtype; give --dtype")
    return next(iter(dtypes.values()))


@contextmanager
def _published(request: ConversionRequest, model: Model, ranks: Ranks, num_bytes: int) -> Iterator[Path]:
    """Make OUT.partial anew and yield it; it becomes OUT after the block, and is removed if anything was raised in it.

    num_bytes: of the tensors, for the mark. Collective.
    """
    target = TargetFolder(request.out, MADE_BY)
    with ExitStack() as stack:
        owner = stack.enter_context(Owner(target.out, target.lock, MADE_BY))

        def start() -> None:
            if ranks.is_main:
                owner.take()
                target.begin()
                stack.callback(target.abandon)  # nothing is left of it behind `publish`

        ranks.together(start)
        yield target.partial

        def finish() -> None:
            if ranks.is_main:
                target.publish(
                    source=str(request.source.resolve()),
                    family=model.family.model_type,
                    dtype=request.dtype or "as in the source",
                    num_bytes=num_bytes,
                    **provenance(request.command, request.revisions),
                )

        ranks.together(finish)


def _writing(ranks: Ranks, out: Path, function: Callable[[], object]) -> None:
    """Run what writes, on every rank. Raises UserError when the disk cannot take it, which the user can mend."""

    def attempt() -> None:
        try:
            function()
        except (OSError, SafetensorError) as error:
            raise UserError(f"{out}: could not be written ({error}); free space on that disk and start again") from None

    ranks.together(attempt)


def _copy_companions(model: Model, target: Path, dtypes: set[str]) -> None:
    """Copy the companion files. config.json is copied byte by byte unless its dtype is no longer the tensors'."""
    raw = read_json(model.hf_folder / "config.json", "the model's config.json")
    stated = raw.get("dtype", raw.get("torch_dtype"))
    now = {FLOATS[name][0] for name in dtypes}
    copy_companions(model.hf_folder, target, dtype=None if stated in now or len(now) > 1 else now.pop())


def _verify(request: ConversionRequest, model: Model, partial: Path, ranks: Ranks) -> Comparison | None:
    """Compare, when asked, and leave the card beside what was written. Collective."""
    ranks.gather(None)
    if not request.verify:
        return None
    comparison = compare(model, ranks.together(lambda: open_model_folder(partial, ranks)), ranks)
    if comparison.differences:
        raise UserError([f"{request.out}: {difference}; nothing was kept" for difference in comparison.differences])
    if ranks.is_main:
        write_card(partial / CARD_NAME, comparison, a=model.path, b=request.out, command=request.command)
    return comparison
