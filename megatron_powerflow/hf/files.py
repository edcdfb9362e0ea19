"""How are a Hugging Face folder's tensors read by range, and which other files go along with them?

Only safetensors: nothing in the folder is ever executed or unpickled. Reading maps the files and copies just the slice
that is asked for.

Left out: what the tensors mean (`operations.py`), who holds them (`live_weights.py`), writing (`shard_files.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_json

if TYPE_CHECKING:
    from torch import Tensor


class FloatType(NamedTuple):
    """A dtype of weights: its name in torch, and the bytes of one number."""

    torch_name: str
    num_bytes: int


# safetensors' name of a dtype -> the dtype, for all those that weights come in which were not quantized
FLOATS = {"F32": FloatType("float32", 4), "BF16": FloatType("bfloat16", 2), "F16": FloatType("float16", 2)}
# Pages of a mapped file count as this process's memory: a file is unmapped after so many bytes have been read of it.
MAPPED_BYTES = 256 * 2**20
MAX_REPORTED = 20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Everything of a folder that is neither weights nor code, which is copied unchanged into an export.
COMPANION_PATTERNS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
)


class _TensorHeader(NamedTuple):
    """What a file's header says of a tensor. dtype: safetensors' name for it."""

    dtype: str
    shape: tuple[int, ...]


class SafetensorsFolder:
    """The tensors of an HF folder, each read by name and range.

    Opening the folder reads the header of every file. Raises UserError when there are no safetensors, when the index
    names missing files, or when a file is truncated or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = Path(folder)
        self._file_of: dict[str, str] = {}
        self._header_of: dict[str, _TensorHeader] = {}
        self._mapped: tuple[str, Any] | None = None  # the file that is open for reading
        self._bytes_read = 0
        violations = []
        for file_name, expected in self._shard_files().items():
            path = self.folder / file_name
            try:
                # numpy's way maps the file as it is; torch's asks for as much memory as it has bytes
                handle = safe_open(path, framework="np")
            except FileNotFoundError:
                violations.append(f"{path}: no such file, but {INDEX_NAME} names it; copy the folder again")
                continue
            except (SafetensorError, OSError) as error:
                violations.append(f"{path}: truncated or damaged safetensors file ({error}); copy it again")
                continue
            with handle:
                for name in handle.keys():  # noqa: SIM118
                    part = handle.get_slice(name)
                    if name in self._file_of:
                        violations.append(
                            f"{path}: tensor {name} is in {self._file_of[name]} as well; save the model again"
                        )
                    self._file_of[name] = file_name
                    self._header_of[name] = _TensorHeader(str(part.get_dtype()), tuple(part.get_shape()))
            missing = sorted((expected or set()) - {name for name, file in self._file_of.items() if file == file_name})
            violations += [f"{path}: lacks tensor {name}, which {INDEX_NAME} places there" for name in missing]
        if violations:
            raise UserError(violations)

    def _shard_files(self) -> Mapping[str, set[str] | None]:
        """Map each file's name to the tensors that the index says it holds; to None where there is no index.

        Raises UserError when the index is damaged, when there are two sets of weights, or none."""
        index = self.folder / INDEX_NAME
        if index.is_file():
            weight_map = read_json(index, "the safetensors index").get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
                raise UserError(f"{index}: has no weight_map of tensor names to file names")
            outside = sorted({name for name in weight_map.values() if Path(name).name != name})
            if outside:
                raise UserError(f"{index}: names files outside the folder: {outside[:3]}")
            files: dict[str, set[str]] = {}
            for tensor, file_name in weight_map.items():
                files.setdefault(file_name, set()).add(tensor)
            if (self.folder / SINGLE_NAME).is_file() and (others := files.keys() - {SINGLE_NAME}):
                raise UserError(
                    f"{self.folder}: holds two sets of weights, {SINGLE_NAME} and those of {INDEX_NAME} "
                    f"({min(others)}, ...); transformers reads the first alone. Take away the one that is not the "
                    "model, or save it again"
                )
            return files
        if (self.folder / SINGLE_NAME).is_file():
            return {SINGLE_NAME: None}
        raise UserError(
            f"{self.folder}: no {SINGLE_NAME} and no {INDEX_NAME}; only safetensors weights are read "
            "(.bin files would run code); save the model again with transformers"
        )

    @staticmethod
    def is_there(folder: Path) -> bool:
        """Tell whether the folder has weights at all: one for a login node may hold config.json and tokenizer alone."""
        return (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()

    def names(self) -> set[str]:
        """Return the names of all tensors in the folder."""
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, as the header has it."""
        return self._header_of[name].shape

    def dtype(self, name: str) -> str:
        """Return safetensors' name of a tensor's dtype: "F32", "BF16", ..."""
        return self._header_of[name].dtype

    def read(self, name: str, *, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        """Read a slice of a tensor, on CPU, in the file's dtype; of the file only these bytes are read.

        rows, columns: half-open (start, stop) of the first and second dimension; None: all.
        Raises UserError when the file cannot be mapped into memory.
        """
        part = self._open(self._file_of[name]).get_slice(name)
        row_slice = slice(*rows) if rows is not None else slice(None)
        value = part[row_slice] if columns is None else part[row_slice, slice(*columns)]
        self._bytes_read += value.nbytes
        return value

    def _open(self, file_name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if self._mapped is None or self._mapped[0] != file_name or self._bytes_read > MAPPED_BYTES:
            path = self.folder / file_name
            try:
                self._mapped = file_name, safe_open(path, framework="pt")
            except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: torch finds no memory to map it
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{path}: a file of {path.stat().st_size / 2**30:.1f} GiB cannot be read here ({reason}); use a "
                    "machine with more memory, or save the model again in smaller shards"
                ) from None
            self._bytes_read = 0
        return self._mapped[1]


def tied_weight_violations(folder: SafetensorsFolder, output: str, embedding: str) -> list[str]:
    """Return a violation when the folder holds both weights of a tied model and they differ; else nothing.

    output, embedding: names of the two tensors. Both are read, a slice of rows at a time.
    """
    if not {output, embedding} <= folder.names():
        return []
    if folder.shape(output) == folder.shape(embedding) and all(
        folder.read(output, rows=rows).equal(folder.read(embedding, rows=rows))
        for rows in _slices(folder.shape(output)[0])
    ):
        return []
    return [
        f"{folder.folder}: config.json says tie_word_embeddings=true, and {output} is not {embedding}; say false there "
        f"if the model has an output weight of its own, or take {output} away"
    ]


def _slices(num_rows: int, rows_at_a_time: int = 4096) -> Iterator[tuple[int, int]]:
    for start in range(0, num_rows, rows_at_a_time):
        yield start, min(start + rows_at_a_time, num_rows)


def _prefix_difference(present: set[str], expected: set[str]) -> str | None:
    """Say how the names differ when all do so by one prefix, which wrappers of other trainers leave behind; else None.

    present: names that are not expected; expected: names that are missing.
    """
    extra, missing = present - expected, expected - present
    for longer, shorter, verb in ((extra, missing, "begin with"), (missing, extra, "lack")):
        for name in sorted(shorter)[:1]:
            for candidate in longer:
                prefix = candidate.removesuffix(name)
                if candidate != prefix and {prefix + ending for ending in shorter} <= longer:
                    return f"{verb} {prefix!r}"
    return None


def check_tensor_names(
    folder: SafetensorsFolder, expected: Mapping[str, tuple[int, ...]], optional: Iterable[str] = ()
) -> None:
    """Check that the folder holds every expected tensor, in its shape and a dtype that is read, and no other tensor.

    expected: name -> shape. optional: names that may be present and are not read, such as a tied lm_head; the rotary
    buffers of old exports are passed over as well. Raises UserError with up to MAX_REPORTED violations.
    """
    present = folder.names()
    known_buffers = {name for name in present if name.endswith("rotary_emb.inv_freq")}
    missing = sorted(set(expected) - present)
    extra = sorted(present - set(expected) - known_buffers - set(optional))
    if fused := [name for name in extra if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        raise UserError(
            f"{folder.folder}: experts stand in one tensor, such as {fused[0]}: transformers 5 wrote it with "
            "save_original_format=False; load and save it there again, with True, its default"
        )
    if missing and extra and (how := _prefix_difference(set(extra), set(missing))):
        raise UserError(
            f"{folder.folder}: the names of {len(missing)} tensors {how}, such as {extra[0]} for {missing[0]}; save "
            "the model again without what wraps it"
        )
    violations = [f"{folder.folder}: tensor {name} is missing" for name in missing]
    violations += [f"{folder.folder}: tensor {name} is not part of this architecture" for name in extra]
    for name in sorted(set(expected) & present):
        if folder.shape(name) != expected[name]:
            violations.append(
                f"{folder.folder}: tensor {name} has shape {folder.shape(name)}, config.json implies {expected[name]}"
            )
        if folder.dtype(name) not in FLOATS:
            violations.append(
                f"{folder.folder}: tensor {name} is {folder.dtype(name)}; only {', '.join(FLOATS)} are read: "
                "give the folder of the unquantized model"
            )
    if violations:
        more = len(violations) - MAX_REPORTED
        raise UserError(violations[:MAX_REPORTED] + ([f"... and {more} more like these"] if more > 0 else []))


def weights_files(folder: Path) -> list[Path]:
    """List the safetensors files of a folder, or those of a converted checkpoint, by name; empty without weights."""
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("release/*.distcp"))
    return [path for path in paths if path.is_file()]


def companion_files(source: Path) -> Iterator[Path]:
    """Yield the relative paths of tokenizer, generation config, chat template and licence, which an export takes along;
    config.json is not among them."""
    for pattern in COMPANION_PATTERNS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and path.suffix != ".py":
                yield path.relative_to(source)


def copy_companions(source: Path, target: Path, *, dtype: str | None) -> None:
    """Copy config.json and the companion files of a model folder, but neither weights nor code. Makes `target`.

    dtype: "float32" or "bfloat16", the exported tensors' own, which replaces the one that config.json states; None
    copies config.json as it is.
    """
    target.mkdir(parents=True, exist_ok=True)
    for relative in companion_files(source):
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)
    if dtype is None:
        shutil.copyfile(source / "config.json", target / "config.json")
        return
    config = read_json(source / "config.json", "the model's config.json")
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype  # transformers 5 and 4 call it differently
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
