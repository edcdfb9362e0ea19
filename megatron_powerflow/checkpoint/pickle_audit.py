"""Can a checkpoint be opened without running its code? torch_dist keeps pickles; look at them before loading.

torch.distributed.checkpoint reads `.metadata` with pickle.load and every entry that is no tensor with
torch.load(weights_only=False): both would call whatever the file names. So the index is first read by an unpickler
that knows only the few classes an index consists of, and each such entry by torch.load(weights_only=True); what does
not pass is refused by name, and so is a `common.pt`, which Megatron-Core reads with weights_only=True. Tensors are read
so by torch itself.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import IO

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_powerflow.checkpoint.megatron_version import BACKEND_NAME, COMMON_NAME
from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import ordinary

COMMON_ENTRY = "common_state/"  # what 0.19 writes among the others, and 0.16 into common.pt
BACKEND = "torch_dist"
MOST_BACKEND_BYTES = 10_000
# what torch.load(weights_only=True) raises of a file that is damaged, or would call something
UNREADABLE = (
    *(OSError, RuntimeError, pickle.UnpicklingError, EOFError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),
)
ALLOWED = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
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


def audit_checkpoint(folder: Path) -> Metadata:
    """Return the index of a torch_dist folder, once all its pickled parts have passed.

    Raises UserError when a pickled part of the folder would do more than describe data, or is damaged.
    """
    path = folder / ".metadata"
    try:
        metadata = _AuditUnpickler(io.BytesIO(ordinary(path).read_bytes())).load()
        entries = dict(metadata.storage_data)
        kinds = {name: type(kind).__name__ for name, kind in metadata.state_dict_metadata.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is not complete") from None
    except (
        OSError,
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
    ) as error:
        raise UserError(f"{path}: refused, its index is damaged or not safe to load: {error}") from None
    _audit_backend(folder / BACKEND_NAME)
    common = folder / COMMON_NAME
    if common.exists():
        _audit_common(common)
    elif (folder / BACKEND_NAME).exists() and not any(index.fqn.startswith(COMMON_ENTRY) for index in entries):
        # a checkpoint of Megatron's, which reads this before anything else
        raise UserError(f"{common}: no such file; the checkpoint is not complete")
    for index, place in entries.items():
        file = folder / place.relative_path
        if (
            file.parent != folder
            or (file.exists() and not file.is_file())
            or getattr(place, "transform_descriptors", None)
        ):
            raise UserError(f"{path}: refused, {index.fqn} is not stored as it is in this folder: {place}")
        if kinds.get(index.fqn) != "TensorStorageMetadata":
            _audit_entry(file, index.fqn, place.offset, place.length)
    return metadata


def _audit_backend(path: Path) -> None:
    """Refuse what Megatron would not take for its own: it reads this file without a look at what it holds."""
    if not path.exists():
        return  # of one of torch's own, which names no backend
    try:
        if not path.is_file() or path.stat().st_size > MOST_BACKEND_BYTES:
            raise ValueError("no file of a few words")
        values = json.loads(path.read_text(encoding="utf-8"))
        known: dict[str, type] = {"sharded_backend": str, "common_backend": str}
        known |= {"sharded_backend_version": int, "common_backend_version": int}
        if not isinstance(values, dict) or not all(type(value) is known.get(key) for key, value in values.items()):
            raise ValueError(f"holds other keys or values than {', '.join(known)}")
        if values.get("sharded_backend") != BACKEND:
            raise ValueError(f"sharded_backend is {values.get('sharded_backend')!r}, not {BACKEND}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: refused, damaged or of another format: {error}") from None


def _audit_common(path: Path) -> None:
    """Refuse a common.pt that cannot be read without running code, whether the tensors need it or not.

    Megatron-Core 0.19 keeps what 0.16 writes there among the other entries.
    """
    if not path.is_file() or _unpacks_to_more(path):
        raise UserError(f"{path}: refused, it is no file as torch writes it, or unpacks to more than it is")
    try:
        torch.load(path, weights_only=True, map_location="cpu")
    except UNREADABLE as error:
        raise UserError(f"{path}: refused, damaged or not safe to load: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _audit_entry(file: Path, name: str, offset: int, length: int) -> None:
    try:
        with ordinary(file).open("rb") as stream:
            stream.seek(offset)
            content = io.BytesIO(stream.read(length))
        if _unpacks_to_more(content):
            raise ValueError(f"{length:,} bytes that unpack to more; torch packs nothing")
        torch.load(content, weights_only=True)
    except UNREADABLE as error:
        raise UserError(f"{file}: refused, {name} is damaged or not safe to load: {_first_line(error)}") from None


def _unpacks_to_more(file: Path | IO[bytes]) -> bool:
    """Whether a part of an archive is packed: torch stores them as they are, and a few kB can unpack to any size.

    Leaves the file at its beginning."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(part.file_size > part.compress_size for part in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False  # no archive; whoever reads it will say what is wrong
    finally:
        if not isinstance(file, Path):
            file.seek(0)
