"""What will this run need, how long will a step take, and does it fit? Each kind of rank is rehearsed.

Left out: how it is shown (`tables.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_powerflow.hf.size import num_parameters
from megatron_powerflow.rehearsal.devices import GPUS_PER_NODE, Device
from megatron_powerflow.rehearsal.job import Job, rank_kinds
from megatron_powerflow.rehearsal.memory import OVERHEAD_BYTES, RankMemory, largest
from megatron_powerflow.rehearsal.save_interval import Saves, save_interval
from megatron_powerflow.rehearsal.search import Found, Searched, search, search_more_gpus
from megatron_powerflow.rehearsal.step_time import StepTime, step_time
from megatron_powerflow.training.resources import CHECKPOINT_BYTES

SEARCH_SECONDS = 20.0
MORE_GPUS_SECONDS = 10.0


@dataclass(frozen=True)
class Host:
    """What a node needs beside its GPUs, in bytes. loading: while weights are read. saved_copy: of the state, while a
    checkpoint is written.

    swapped: pinned copies of base and policy where the reference is swapped. checkpoint: on the disk, one of them.
    """

    processes: int
    loading: int
    saved_copy: int
    swapped: int
    checkpoint: int


@dataclass(frozen=True)
class Proposal:
    """A neighbour that fits, rehearsed whole."""

    found: Found
    ranks: tuple[RankMemory, ...]
    time: StepTime


@dataclass(frozen=True)
class Rehearsal:
    """All that a rehearsal found. searched: None where it fits."""

    job: Job
    device: Device
    ranks: tuple[RankMemory, ...]
    time: StepTime
    host: Host
    saves: Saves
    searched: Searched | None
    proposals: tuple[Proposal, ...]

    @property
    def with_servers(self) -> float:
        """The bytes of a GPU that trainer and server share, while the server is awake; 0.0 where they share none."""
        servers = self.job.config.rollout.vllm
        if not (self.job.is_served and servers.sleeps and servers.memory):
            return 0.0
        resting = max(rank.resting for rank in self.ranks)
        return resting + OVERHEAD_BYTES + servers.memory * self.device.memory

    @property
    def fits(self) -> bool:
        """Whether every kind of rank has room on the device, beside a server that is awake, too."""
        return max(largest(self.ranks).needed, self.with_servers) <= self.device.memory


def rehearse(
    job: Job,
    device: Device,
    *,
    save_delay: float | None = None,
    node_hours: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Rehearsal:
    """Rehearse every kind of rank, and look for what fits where the job does not. In a process of `prepare`.

    save_delay: seconds that training loses by a save, node_hours: between failures of a node, where they were measured.
    say: is told what goes on.
    """
    ranks = _whole(job, say)
    time = step_time(job, ranks, device)
    host = _host(job, ranks)
    saves = save_interval(job, host.checkpoint, time.total, delay=save_delay, node_hours=node_hours)
    proposals: list[Proposal] = []
    searched = None
    if largest(ranks).needed > device.memory:
        say("it does not fit; trying layouts and settings near it")
        searched = search(job, device, _first_stage, seconds=SEARCH_SECONDS)
        candidates = searched.found
        if not candidates:
            say("nothing of as many GPUs does; trying more of them")
            candidates = search_more_gpus(job, device, _first_stage, seconds=MORE_GPUS_SECONDS)
        for found in candidates:
            others = _whole(found.job, lambda text: None)
            if largest(others).needed <= device.memory:
                proposals.append(Proposal(found, others, step_time(found.job, others, device)))
    proposals.sort(key=lambda proposal: (len(proposal.found.changes), proposal.time.total))
    return Rehearsal(job, device, ranks, time, host, saves, searched, tuple(proposals))


def _whole(job: Job, say: Callable[[str], None]) -> tuple[RankMemory, ...]:
    from megatron_powerflow.rehearsal.phases import rehearse_rank

    ranks = []
    for kind in rank_kinds(job):
        say(f"rehearsing rank {kind.rank} of {job.layout.world_size}: {kind.name}")
        ranks.append(rehearse_rank(job, kind))
    return tuple(ranks)


def _first_stage(job: Job) -> RankMemory:
    from megatron_powerflow.rehearsal.phases import rehearse_rank

    return rehearse_rank(job, rank_kinds(job)[0])


def _host(job: Job, ranks: tuple[RankMemory, ...]) -> Host:
    processes = min(job.layout.world_size, GPUS_PER_NODE)
    checkpoint = num_parameters(job.architecture) * CHECKPOINT_BYTES
    weights = max(rank.parts["weights"] for rank in ranks)
    return Host(
        processes=processes,
        loading=max(rank.loading for rank in ranks) * processes,
        saved_copy=checkpoint // job.layout.world_size * processes if job.config.checkpoint.asynchronous else 0,
        swapped=2 * weights * processes if job.config.model.reference == "swap" else 0,
        checkpoint=checkpoint,
    )
