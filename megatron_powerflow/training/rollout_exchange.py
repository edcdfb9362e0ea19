"""Which rollouts travel between ranks? Those that another replica trains on, or another sampler drew, or a file is for.

    to_replicas     packed, groups change replicas for the sake of balance (`micro_batches.py`)
    over_samplers   context-parallel ranks sample apart and train together (`step_rollouts.py`)
    to_main         the main rank writes the rollouts of all into a file

All ranks of a replica hold its rollouts alike. So each rank sends them to the rank at its own place of the other
replica, and what a rank sends and receives does not grow with tp, pp or the number of replicas.

Left out: how they become bytes (`data/rollout_arrays.py`) and how bytes travel (`parallel/exchange.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from megatron_powerflow.data.rollout_arrays import from_bytes, to_bytes
from megatron_powerflow.parallel.exchange import exchange
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import Rollout


def to_replicas(parts: Sequence[Sequence[Rollout]], groups: Groups) -> list[Rollout]:
    """Send each data-parallel rank its part, and return this one's, by slot, then response.

    parts: for each data-parallel rank, of the rollouts of this replica, alike on all its ranks. Collective over the
    run.
    """
    own = groups.dp_rank
    if groups.dp_size == 1:
        return _joined(parts[own], [])
    others = {dist.get_global_rank(groups.dp, rank): part for rank, part in enumerate(parts) if part and rank != own}
    return _joined(parts[own], exchange({rank: to_bytes(part) for rank, part in others.items()}, groups))


def over_samplers(rollouts: Sequence[Rollout], groups: Groups) -> list[Rollout]:
    """Return the rollouts of all samplers of this replica, its context-parallel ranks, by slot, then response.

    rollouts: of this sampler, alike over tp and pp. Collective over the run.
    """
    if groups.cp_size == 1:
        return _joined(rollouts, [])
    others = [dist.get_global_rank(groups.cp, rank) for rank in range(groups.cp_size) if rank != groups.cp_rank]
    return _joined(rollouts, exchange(dict.fromkeys(others, to_bytes(rollouts)), groups))


def to_main(rollouts: Sequence[Rollout], groups: Groups) -> list[Rollout]:
    """Return the rollouts of all replicas on the main rank, by slot, then response; [] elsewhere.

    rollouts: of this replica, alike on all its ranks. One rank of each replica sends; the main rank is of the first,
    which therefore need not. Collective over the run.
    """
    sends = groups.speaks_for_replica and groups.dp_rank != 0
    received = exchange({0: to_bytes(rollouts)} if sends else {}, groups)
    return _joined(rollouts, received) if groups.is_main else []


def _joined(own: Sequence[Rollout], received: Sequence[np.ndarray]) -> list[Rollout]:
    everything = [*own, *(rollout for data in received for rollout in from_bytes(data))]
    return sorted(everything, key=lambda rollout: (rollout.slot, rollout.response_index))
