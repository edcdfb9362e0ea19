"""What is in a model's folder, whichever of the two kinds it is?

An `HfModel` is a Hugging Face folder; a `MegatronModel` a checkpoint of a run, of any layout, or a converted one. Both
give their parameters one at a time: as HF tensors, which is how two folders are compared and an HF folder is written.
Opening one checks every name, shape and dtype; each violation is named, all at once.

Left out: the log Z' head and the optimizer of a run's checkpoint: no parameter of the model asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.checkpoint.digests import check_share
from megatron_powerflow.checkpoint.folder import CONFIG_NAME, HF_NAME, find_checkpoint, is_converted, tensors_folder
from megatron_powerflow.converter.ranks import Ranks
from megatron_powerflow.converter.torch_dist import TorchDistFolder
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.checked import open_checked
from megatron_powerflow.hf.config import read_architecture
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.files import FLOATS, SafetensorsFolder
from megatron_powerflow.hf.ordinary_files import refuse_links_outside, require_ordinary_files
from megatron_powerflow.hf.shapes import impossible_sizes
from megatron_powerflow.hf.shard_files import TensorInfo
from megatron_powerflow.hf.torch_dist_names import (
    EMBEDDING,
    StoredParameter,
    StoredSlice,
    parameter_shape,
    stored_parameters,
    whole,
)

if TYPE_CHECKING:
    from torch import Tensor

OPTIMIZER_PREFIXES = ("optimizer.", "chained_")


@dataclass(frozen=True)
class HfModel:
    """A Hugging Face folder, opened and checked."""

    path: Path
    architecture: Architecture
    family: Family
    source: SafetensorsFolder

    @property
    def hf_folder(self) -> Path:
        """Return the folder of config.json and the tokenizer."""
        return self.path

    def info(self, stored: StoredParameter) -> dict[str, TensorInfo]:
        """Return the header entries of the parameter's HF tensors."""
        return {name: TensorInfo(self.source.dtype(name), self.source.shape(name)) for name in stored.hf_names}

    def read(self, stored: StoredParameter) -> dict[str, Tensor]:
        """Read the parameter's HF tensors."""
        return {name: self.source.read(name) for name in stored.hf_names}

    def parameter(self, stored: StoredParameter, padded_vocab_size: int) -> Tensor:
        """Read the parameter as Megatron holds it, whole."""
        return stored.op.shard(self.source, stored.hf_names, whole(self.architecture, padded_vocab_size))


@dataclass(frozen=True)
class MegatronModel:
    """A checkpoint of a run, or a converted one, opened and checked."""

    path: Path
    architecture: Architecture
    family: Family
    source: TorchDistFolder
    padded_vocab_size: int
    dtypes: dict[str, str]  # global tensor -> safetensors' name of its dtype

    @property
    def hf_folder(self) -> Path:
        """Return the folder of config.json and the tokenizer."""
        return self.path / HF_NAME

    def present_slices(self, stored: StoredParameter) -> list[StoredSlice]:
        """Return the slices of the checkpoint that hold the parameter; all of them hold the same numbers."""
        return [slice_ for slice_ in stored.slices if slice_.key in self.dtypes]

    def info(self, stored: StoredParameter) -> dict[str, TensorInfo]:
        """Return the header entries of the parameter's HF tensors."""
        dtype = self.dtypes[self.present_slices(stored)[0].key]
        shapes = stored.op.hf_shapes(self.architecture)
        return {name: TensorInfo(dtype, shape) for name, shape in zip(stored.hf_names, shapes, strict=True)}

    def read(self, stored: StoredParameter) -> dict[str, Tensor]:
        """Read the parameter as HF tensors. Raises UserError where its slices do not agree."""
        import torch

        first, *others = [self.source.read(slice_) for slice_ in self.present_slices(stored)]
        for slice_, other in zip(self.present_slices(stored)[1:], others, strict=True):
            if not torch.equal(first, other):
                raise UserError(
                    f"{self.source.folder}: tensor {slice_.key}{list(slice_.index)} differs from "
                    f"{self.present_slices(stored)[0].key}, which is the same parameter; the checkpoint is damaged"
                )
        merged = stored.op.merge([first], whole(self.architecture, self.padded_vocab_size))
        return dict(zip(stored.hf_names, merged, strict=True))


Model = HfModel | MegatronModel


def open_model_folder(path: Path, ranks: Ranks, *, step: int | None = None) -> Model:
    """Open an HF folder, a checkpoint of a run, a run's folder (its latest, or that of `step`) or a converted
    checkpoint.

    Raises UserError with everything that is wrong with its config, names, shapes and dtypes. Collective: of a run's
    checkpoint every rank checks the digests of its share of the files.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder")
    checkpoint = find_checkpoint(path, step)
    if checkpoint is not None:
        return _open_megatron(checkpoint, ranks)
    if step is not None or (path / CONFIG_NAME).is_file():
        raise UserError(f"{path}: a run without a checkpoint")
    require_ordinary_files(path)
    refuse_links_outside(path, list(path.glob("*.safetensors*")))
    architecture, family = read_architecture(path, FAMILIES)
    return HfModel(path, architecture, family, open_checked(path, architecture, family))


def _open_megatron(checkpoint: Path, ranks: Ranks) -> MegatronModel:
    if not is_converted(checkpoint):
        ranks.together(lambda: check_share(checkpoint, ranks.rank, ranks.size))
    require_ordinary_files(checkpoint / HF_NAME)
    architecture, family = read_architecture(checkpoint / HF_NAME, FAMILIES)
    source = TorchDistFolder(tensors_folder(checkpoint))
    tensors = source.tensors()
    model = {name: value for name, value in tensors.items() if not name.startswith(OPTIMIZER_PREFIXES)}
    parts = sum(_num_parts(name, shape, architecture) for name, (shape, _) in model.items())
    if impossible := impossible_sizes(architecture, parts):
        raise UserError([f"{checkpoint / HF_NAME}: {violation}" for violation in impossible])
    by_torch_name = {f"torch.{name}": key for key, (name, _) in FLOATS.items()}
    dtypes = {name: by_torch_name.get(str(dtype), str(dtype)) for name, (_, dtype) in model.items()}
    padded = model.get(EMBEDDING, ((0,), None))[0][0]
    opened = MegatronModel(checkpoint, architecture, family, source, padded, dtypes)
    if violations := _violations(opened, {name: shape for name, (shape, _) in model.items()}):
        raise UserError([f"{source.folder}: {violation}" for violation in violations])
    return opened


def _num_parts(name: str, shape: Sequence[int], architecture: Architecture) -> int:
    """Return how many parameters a global tensor is made of."""
    lead = 2 if ".experts.experts." in name else 1 if name.startswith("decoder.layers.") else 0
    count = 1
    for size in shape[:lead]:
        count *= size
    return count


def _violations(model: MegatronModel, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Return everything of a checkpoint that does not fit its config.json, by the tensor's name."""
    architecture, violations, known = model.architecture, {}, set()
    if model.padded_vocab_size < architecture.vocab_size:
        if EMBEDDING in shapes:
            violations[EMBEDDING] = (
                f"has {model.padded_vocab_size} rows, config.json says vocab_size={architecture.vocab_size}"
            )
        else:
            violations[EMBEDDING] = "is missing"
    padded = max(model.padded_vocab_size, architecture.vocab_size)
    of_op: dict[str, tuple[int, ...]] = {}
    for stored in stored_parameters(architecture, model.family):
        known |= {slice_.key for slice_ in stored.slices}
        slices = [slice_ for slice_ in stored.slices if slice_.key in shapes]
        if not slices:
            violations[stored.slices[0].key] = "is missing"
            continue
        if stored.op.megatron not in of_op:
            of_op[stored.op.megatron] = parameter_shape(stored, architecture, padded)
        for slice_ in slices:
            wanted = (*slice_.lead, *of_op[stored.op.megatron])
            if shapes[slice_.key] != wanted and slice_.key not in violations:
                violations[slice_.key] = f"has shape {shapes[slice_.key]}, config.json implies {wanted}"
            if model.dtypes[slice_.key] not in FLOATS:
                violations[slice_.key] = f"is {model.dtypes[slice_.key]}; only {', '.join(FLOATS)} are read"
    violations |= dict.fromkeys(sorted(set(shapes) - known), "is not part of this architecture")
    return [f"tensor {name} {what}" for name, what in violations.items()]


def total_bytes(model: Model) -> int:
    """Return the bytes of the model's HF tensors."""
    parameters = stored_parameters(model.architecture, model.family)
    return sum(info.num_bytes for stored in parameters for info in model.info(stored).values())
