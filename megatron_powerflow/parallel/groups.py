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
        """The rank of this process in its tensor-parallel group."""
        return dist.get_rank(self.tp)

    @property
    def tp_size(self) -> int:
        """The number of ranks in the tensor-parallel group."""
        return dist.get_world_size(self.tp)

    @property
    def pp_rank(self) -> int:
        """The rank of this process in its pipeline-parallel group, which is its stage."""
        return dist.get_rank(self.pp)

    @property
    def pp_size(self) -> int:
        """The number of ranks in the pipeline-parallel group, which is that of the stages."""
        return dist.get_world_size(self.pp)

    @property
    def cp_rank(self) -> int:
        """The rank of this process in its context-parallel group."""
        return dist.get_rank(self.cp)

    @property
    def cp_size(self) -> int:
        """The number of ranks in the context-parallel group."""
        return dist.get_world_size(self.cp)

    @property
    def dp_rank(self) -> int:
        """The rank of this process in its data-parallel group."""
        return dist.get_rank(self.dp)

    @property
    def dp_size(self) -> int:
        """The number of ranks in the data-parallel group."""
        return dist.get_world_size(self.dp)

    @property
    def ep_rank(self) -> int:
        """The rank of this process in its expert-parallel group."""
        return dist.get_rank(self.ep)

    @property
    def ep_size(self) -> int:
        """The number of ranks in the expert-parallel group."""
        return dist.get_world_size(self.ep)

    @property
    def edp_rank(self) -> int:
        """The rank of this process among those that hold the same experts."""
        return dist.get_rank(self.edp)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first stage of the pipeline."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last stage of the pipeline."""
        return self.pp_rank == self.pp_size - 1

    @property
    def sampler_rank(self) -> int:
        """The number of the sampler that this rank belongs to, and so of the share of the prompts that it answers.

        Context-parallel ranks hold the same weights, so in sampling they are replicas like those of dp.
        """
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def num_samplers(self) -> int:
        """The number of samplers: each answers a share of the prompts of its own."""
        return self.dp_size * self.cp_size

    @property
    def speaks_for_replica(self) -> bool:
        """Whether this is the one rank of its replica that tells what all of its ranks know."""
        return self.is_last_stage and self.tp_rank == 0 and self.cp_rank == 0

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes metrics."""
        return self.rank == 0
