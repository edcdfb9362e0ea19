"""How does data travel to the ranks that need it, and to no others? As bytes, unpadded, over host memory.

    rank 0 has   a for 1, bc for 2         rank 1 receives   a
    rank 1 has   d for 2                   rank 2 receives   bc, d

The sizes go first, one number for each pair of ranks, and the bytes then. What a rank sends and receives is its own
share alone, whatever the others exchange.

Left out: what the bytes stand for (`data/rollout_arrays.py`), what every rank needs alike (`collectives.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from megatron_powerflow.parallel.groups import Groups


def exchange(parts: Mapping[int, np.ndarray], groups: Groups) -> list[np.ndarray]:
    """Send each part to its rank, and return what others sent to this one, by the senders' ranks.

    parts: of ranks of the run, this one not among them, [n] uint8 each. Uses host memory. Collective over the run, with
    parts or without.
    """
    assert groups.rank not in parts
    sizes = torch.tensor([len(parts.get(rank, ())) for rank in range(groups.world_size)])
    coming = torch.empty_like(sizes)
    dist.all_to_all_single(coming, sizes, group=groups.control)
    outgoing = torch.from_numpy(np.concatenate([np.empty(0, np.uint8), *(parts[rank] for rank in sorted(parts))]))
    incoming = torch.empty(int(coming.sum()), dtype=torch.uint8)
    dist.all_to_all_single(incoming, outgoing, coming.tolist(), sizes.tolist(), group=groups.control)
    return [part.numpy() for part in incoming.split(coming.tolist()) if len(part)]
