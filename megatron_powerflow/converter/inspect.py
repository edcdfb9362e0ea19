"""What does a model's folder hold, or a store of reference scores? Headers and indexes only: no tensor is read.

Left out: whether it is whole and right (`model_folders.py`, `compare.py`): a folder that is not can be looked at too.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from megatron_powerflow.checkpoint.folder import CONFIG_NAME, HF_NAME, find_checkpoint, is_converted, tensors_folder
from megatron_powerflow.config_file import load_recorded_config
from megatron_powerflow.converter.torch_dist import TorchDistFolder
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_json
from megatron_powerflow.hf.files import FLOATS, SafetensorsFolder
from megatron_powerflow.reference_store.folder import count_store, is_store

ITEM_BYTES = {**dict(FLOATS.values()), "float64": 8, "int64": 8, "int32": 4, "uint8": 1}


def inspect(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Return kind, path, step, layout, training, config, num_files, num_bytes and tensors of a model's folder.

    tensors: name -> shape, dtype, num_bytes. Only a run's checkpoint has step, layout and training. Of a store of
    reference scores: kind, path, num_bytes, bases and notes. Raises UserError where there is neither, or an index that
    would run code.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if is_store(folder):
        return _of_store(folder)
    checkpoint = find_checkpoint(folder, step)
    if checkpoint is None:
        if step is not None:
            raise UserError(f"{folder}: --step {step}, and it is no run's folder")
        source = SafetensorsFolder(folder)
        names = {key: name for key, (name, _) in FLOATS.items()}
        tensors = {
            name: (source.shape(name), names.get(source.dtype(name), source.dtype(name)))
            for name in sorted(source.names(), key=_by_number)
        }
        files = list(folder.glob("*.safetensors"))
        return _entry("Hugging Face folder", folder, folder, tensors, files)
    stored = tensors_folder(checkpoint)
    tensors = {
        name: (shape, str(dtype).removeprefix("torch."))
        for name, (shape, dtype) in sorted(
            TorchDistFolder(stored).tensors().items(), key=lambda item: _by_number(item[0])
        )
    }
    summary = _entry("converted checkpoint", checkpoint, checkpoint / HF_NAME, tensors, list(stored.glob("*.distcp")))
    if is_converted(checkpoint):
        return summary
    run = load_recorded_config(checkpoint / CONFIG_NAME)
    progress = read_json(checkpoint / "progress.json", "the checkpoint's progress")
    sizes = run.parallel.model_dump()
    layout = {name: sizes[name] for name in ("tp", "cp", "pp", "vpp", "ep") if sizes.get(name) is not None}
    return summary | {
        "kind": "checkpoint of a run",
        "step": progress.get("step"),
        "layout": layout | {"processes": len({path.name.split("_")[2] for path in stored.glob("*.distcp")})},
        "training": {"objective": run.objective.model_dump(mode="json"), "hf_path": run.model.hf_path},
    }


def _of_store(folder: Path) -> dict[str, Any]:
    counts, notes = count_store(folder)
    return {
        "kind": "store of reference scores",
        "path": str(folder),
        "num_bytes": sum(file.stat().st_size for file in folder.iterdir() if file.is_file()),
        "bases": [asdict(count) for count in counts],
        "notes": notes,
    }


def _entry(kind: str, path: Path, hf_folder: Path, tensors: dict, files: list[Path]) -> dict[str, Any]:
    return {
        "kind": kind,
        "path": str(path),
        "config": read_json(hf_folder / "config.json", "the model's config.json"),
        "num_files": len(files),
        "num_bytes": sum(file.stat().st_size for file in files),
        "tensors": {
            name: {"shape": list(shape), "dtype": dtype, "num_bytes": prod(shape) * ITEM_BYTES.get(dtype, 1)}
            for name, (shape, dtype) in tensors.items()
        },
    }


def _by_number(name: str) -> list:
    """Return a sort key that puts model.layers.2 before model.layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def describe(summary: dict[str, Any]) -> str:
    """Describe what `inspect` returned for people: a few lines, then one for each tensor."""
    lines = [f"{summary['kind']}: {summary['path']}"]
    if "bases" in summary:
        return "\n".join([*lines, *_lines_of_store(summary)])
    if "step" in summary:
        layout = ", ".join(f"{name}={value}" for name, value in summary["layout"].items())
        lines += [f"step {summary['step']}, saved under {layout}", f"trained from {summary['training']['hf_path']}"]
    lines += [f"config: {json.dumps(summary['config'])}"]
    tensors = summary["tensors"]
    lines.append(f"{len(tensors)} tensors in {summary['num_files']} files of {summary['num_bytes'] / 1e9:.3f} GB")
    width = max((len(name) for name in tensors), default=0)
    for name, entry in tensors.items():
        shape = " x ".join(map(str, entry["shape"])) or "1"
        lines.append(f"  {name:{width}}  {entry['dtype']:9}  {shape:24}  {entry['num_bytes'] / 1e6:12.3f} MB")
    return "\n".join(lines)


def _lines_of_store(summary: dict[str, Any]) -> list[str]:
    """Describe each base in two lines, and what is damaged. What the folder says of a base is shown as JSON."""
    lines = [f"{len(summary['bases'])} base(s), {summary['num_bytes'] / 1e6:.3f} MB"]
    for count in summary["bases"]:
        lines.append(
            f"base {count['base'][:16]}: {count['num_responses']:,} responses of {count['num_passes']:,} passes, "
            f"{count['num_tokens']:,} response tokens"
        )
        about = {name: count["about"].get(name) for name in ("hf_path", "temperature", "precision")}
        lines.append(f"  {json.dumps(about)}")
    return lines + [f"notice: {note}" for note in summary["notes"]]
