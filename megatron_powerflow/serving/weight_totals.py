"""What are the weights of a version, over all ranks? Their checksums, and how many bytes they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch.distributed as dist

from megatron_powerflow.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class Totals:
    """checksums: of every tensor, by Hugging Face name. num_bytes: that went to the servers; whole_bytes: of all."""

    checksums: dict[str, str] = field(repr=False)
    num_bytes: int
    whole_bytes: int


def gathered(checksums: dict[str, str], num_bytes: int, expected: Mapping[str, object], groups: Groups) -> Totals:
    """Return the totals of all ranks' parts, on every rank. Collective.

    Raises AssertionError where they are not the tensors that are expected, by name.
    """
    everyone: list[tuple[dict[str, str], int]] = [({}, 0)] * groups.world_size
    dist.all_gather_object(everyone, (checksums, num_bytes), group=groups.control)
    merged = {name: value for part, _ in everyone for name, value in part.items()}
    if set(merged) != set(expected):
        raise AssertionError(f"the weights differ from the model's tensors: {sorted(set(merged) ^ set(expected))[:5]}")
    return Totals(merged, sum(size for _, size in everyone), sum(map(_bytes_of, merged.values())))


def _bytes_of(text: str) -> int:
    """The bytes of a tensor, by its checksum's text: dtype:shape:sums."""
    dtype, shape, _ = text.split(":")
    count = int(np.prod([int(extent) for extent in shape.split("x") if extent], dtype=np.int64))
    return count * (4 if dtype == "float32" else 2)
