"""Can a checkpoint be opened without running its code? torch_dist keeps its index as a pickle; look before loading.

torch.distributed.checkpoint reads `.metadata` with pickle.load, which would call whatever the file names, and objects
other than tensors with torch.load(weights_only=False). So the index is first read by an unpickler that knows only the
few classes an index of tensors consists of; anything else, an entry of bytes included, is refused by name. Our
checkpoints hold no such entry. Tensors and `common.pt` are read with weights_only=True.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch

from megatron_powerflow.errors import UserError

ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.metadata", "StorageMeta"),
        ("torch.distributed.checkpoint.metadata", "TensorProperties"),
        ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
        ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("torch.distributed.checkpoint.planner", "TensorWriteData"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
    }
)


class _AuditUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in ALLOWED and not dtype:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")
        return super().find_class(module, name)


def audit_checkpoint(folder: Path) -> None:
    """Raises UserError when the folder's pickled index would do more than describe tensors, or is damaged."""
    path = folder / ".metadata"
    try:
        _AuditUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is not complete") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: refused, its index is damaged or not safe to load: {error}") from None
