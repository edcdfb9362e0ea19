"""Which process groups does this rank belong to? One record, handed to whoever communicates.

Left out: how the groups come to be (`initialize.py`) and what is sent over them (`collectives.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Groups:
    """Process groups, ranks and device of this process.

    `tp pp cp dp ep edp` run on the compute backend (nccl, or gloo on CPU). The `control` groups are gloo groups
    over host memory on every machine: decisions and tokens go there and never queue behind a kernel.
    `ep`: ranks that hold different experts of one stage; `edp`: ranks that hold the same ones. ep x edp = cp x dp.
    """

    rank: int
    world_size: int
    device: torch.device
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    # ranks with other rollouts, the same place in the model and the same part of each sequence
    dp: dist.ProcessGroup
    ep: dist.ProcessGroup
    edp: dist.ProcessGroup
    # all ranks that hold the same stage: tp x cp x dp
    tp_dp: dist.ProcessGroup
    control: dist.ProcessGroup
    pp_control: dist.ProcessGroup
    ep_control: dist.ProcessGroup

    @property
    def tp_rank(self) -> int:
        return dist.get_rank(self.tp)

    @property
    def tp_size(self) -> int:
        return dist.get_world_size(self.tp)

    @property
    def pp_rank(self) -> int:
        return dist.get_rank(self.pp)

    @property
    def pp_size(self) -> int:
        return dist.get_world_size(self.pp)

    @property
    def cp_rank(self) -> int:
        return dist.get_rank(self.cp)

    @property
    def cp_size(self) -> int:
        return dist.get_world_size(self.cp)

    @property
    def dp_rank(self) -> int:
        return dist.get_rank(self.dp)

    @property
    def dp_size(self) -> int:
        return dist.get_world_size(self.dp)

    @property
    def ep_rank(self) -> int:
        return dist.get_rank(self.ep)

    @property
    def ep_size(self) -> int:
        return dist.get_world_size(self.ep)

    @property
    def edp_rank(self) -> int:
        return dist.get_rank(self.edp)

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def sampler_rank(self) -> int:
        """Which share of the prompts this rank answers: context-parallel ranks hold the same weights, so in sampling
        they are replicas like those of dp."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def num_samplers(self) -> int:
        return self.dp_size * self.cp_size

    @property
    def speaks_for_replica(self) -> bool:
        """One rank of each replica: what all of its ranks know is told by this one."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def is_main(self) -> bool:
        """The rank that prints and writes metrics."""
        return self.rank == 0
