"""What will this run need, how long will a step take, and does it fit? Each kind of rank is rehearsed.

Left out: how it is shown (`tables.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_powerflow.rehearsal.devices import GPUS_PER_NODE, Device
from megatron_powerflow.rehearsal.job import Job, rank_kinds
from megatron_powerflow.rehearsal.memory import RankMemory, largest
from megatron_powerflow.rehearsal.search import Found, Searched, search
from megatron_powerflow.rehearsal.step_time import SAVE_RATE, StepTime, save_interval, step_time
from megatron_powerflow.training.plan import num_parameters
from megatron_powerflow.training.resources import CHECKPOINT_BYTES

SEARCH_SECONDS = 25.0


@dataclass(frozen=True)
class Host:
    """What a node needs beside its GPUs, in bytes. saved_copy: of the state, while a checkpoint is written.

    swapped: pinned copies of base and policy where the reference is swapped. checkpoint: on the disk, one of them.
    """

    processes: int
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
    """All that a rehearsal found. save_every: (steps, seconds) by Young and Daly. searched: None where it fits."""

    job: Job
    device: Device
    ranks: tuple[RankMemory, ...]
    time: StepTime
    host: Host
    save_seconds: float
    save_every: tuple[int, float]
    searched: Searched | None
    proposals: tuple[Proposal, ...]

    @property
    def fits(self) -> bool:
        """Whether every kind of rank has room on the device."""
        return largest(self.ranks).needed <= self.device.memory


def rehearse(
    job: Job, device: Device, *, save_seconds: float | None = None, say: Callable[[str], None] = lambda text: None
) -> Rehearsal:
    """Rehearse every kind of rank, and look for what fits where the job does not. In a process of `prepare`.

    save_seconds: what a save takes, where it was measured. say: is told what goes on.
    """
    ranks = _whole(job, say)
    time = step_time(job, ranks, device)
    host = _host(job, ranks)
    if save_seconds is None:
        nodes = math.ceil(job.layout.world_size / GPUS_PER_NODE)
        save_seconds = host.checkpoint / (nodes * SAVE_RATE)
    every = save_interval(job, time.total, save_seconds)
    proposals: list[Proposal] = []
    searched = None
    if largest(ranks).needed > device.memory:
        say("it does not fit; trying layouts and settings near it")
        searched = search(job, device, _first_stage, seconds=SEARCH_SECONDS)
        for found in searched.found:
            others = _whole(found.job, lambda text: None)
            if largest(others).needed <= device.memory:
                proposals.append(Proposal(found, others, step_time(found.job, others, device)))
    proposals.sort(key=lambda proposal: (len(proposal.found.changes), proposal.time.total))
    return Rehearsal(job, device, ranks, time, host, save_seconds, every, searched, tuple(proposals))


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
        saved_copy=checkpoint // job.layout.world_size * processes if job.config.checkpoint.asynchronous else 0,
        swapped=2 * weights * processes if job.config.model.reference == "swap" else 0,
        checkpoint=checkpoint,
    )
