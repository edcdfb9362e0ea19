"""What have the ranks of a part seen, taken together? Their files become one set of arrays.

Left out: writing them (`seen.py`). No torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


@dataclass(frozen=True, slots=True)
class SeenPart:
    """tensors: by the names of `seen.py`; what a second rank has under a name has the rank behind it. digests: of each
    part of the model, one of every rank that holds it."""

    tensors: dict[str, np.ndarray]
    digests: dict[str, list[str]]


def read_seen(folder: Path) -> SeenPart:
    """Read what all ranks of a part have written."""
    tensors: dict[str, np.ndarray] = {}
    digests: dict[str, list[str]] = {}
    for path in sorted(folder.glob("rank_*.safetensors")):
        for name, value in load_file(path).items():
            tensors[f"{name} of {path.stem}" if name in tensors else name] = value
    for path in sorted(folder.glob("rank_*.digests.json")):
        for name, digest in json.loads(path.read_text(encoding="utf-8")).items():
            digests.setdefault(name, []).append(digest)
    return SeenPart(tensors, digests)


def read_model(folder: Path) -> dict[str, np.ndarray]:
    """Read the weights of a Hugging Face folder, by name."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}
