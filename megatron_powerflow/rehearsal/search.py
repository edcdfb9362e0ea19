"""Which layouts and settings near this one fit the device? Found by trying them.

A neighbour differs in a few settings. Each is rehearsed with two layers a chunk and with four, from which its full
depth follows, as every layer takes the same; those that are shown are rehearsed whole.

Where none does, the same is tried with more GPUs.

Left out: fewer GPUs; batch sizes that change what is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product

from megatron_powerflow.config import Config
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.size import num_parameters
from megatron_powerflow.parallel.batching import longest_rollout
from megatron_powerflow.parallel.layout import plan_layout
from megatron_powerflow.rehearsal.devices import GPUS_PER_NODE, Device
from megatron_powerflow.rehearsal.job import Job
from megatron_powerflow.rehearsal.memory import OVERHEAD_BYTES, RankMemory

Changes = tuple[tuple[str, object], ...]
WORLD_SIZE = "--world-size"  # among changes: the number of GPUs
DEPTHS = (2, 4)  # layers a chunk
WANTED = 4
TIMES_THE_GPUS = (2, 4, 8, 16)


@dataclass(frozen=True)
class Found:
    """A neighbour that fits. changes: keys and values that differ, and WORLD_SIZE. needed: bytes of its first stage."""

    changes: Changes
    job: Job
    needed: float


def neighbours(job: Job) -> Iterator[tuple[Changes, Job]]:
    """Yield (changed keys with their values, job) for all that is possible, the fewest changes first."""
    config, world = job.config, job.layout.world_size
    found = []
    for tp, pp, recompute, reference, (batching, size), rows, distributed in product(
        _sizes(world, GPUS_PER_NODE),
        _sizes(world, job.architecture.num_layers),
        dict.fromkeys((config.model.recompute, "full")),
        dict.fromkeys((config.model.reference, "swap")),
        dict.fromkeys((_batching(config), _smallest_batching(job))),
        dict.fromkeys((config.rollout.max_concurrent_rows, max(1, config.rollout.max_concurrent_rows // 4))),
        dict.fromkeys((config.optimizer.distributed, True)),
    ):
        wanted = {
            "parallel.tp": tp,
            "parallel.pp": pp,
            "parallel.sequence_parallel": tp > 1 if tp != config.parallel.tp else config.parallel.sequence_parallel,
            "model.recompute": recompute,
            "model.reference": reference,
            f"parallel.{batching}": size,
            "rollout.max_concurrent_rows": rows,
            "optimizer.distributed": distributed,
        }
        changes = tuple((key, value) for key, value in wanted.items() if _value(config, key) != value)
        if changes and (other := _job(job, wanted)) is not None:
            found.append((changes, other))
    yield from sorted(found, key=lambda pair: (len(pair[0]), _distance(job, pair[1])))


def _batching(config: Config) -> tuple[str, int | None]:
    """Return the key that says how large a micro-batch is, and its value."""
    parallel = config.parallel
    if parallel.micro_batch_size is not None:
        return "micro_batch_size", parallel.micro_batch_size
    return "max_tokens_per_micro_batch", parallel.max_tokens_per_micro_batch


def _smallest_batching(job: Job) -> tuple[str, int]:
    """Return the same key with the smallest value: one of the longest rollouts."""
    key, _ = _batching(job.config)
    return key, 1 if key == "micro_batch_size" else longest_rollout(job.config, job.layout)


def _sizes(world: int, most: int) -> list[int]:
    return [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= most and world % size == 0]


def shallow(job: Job, layers_per_chunk: int) -> Job:
    """Return the job with so many layers a chunk, of the same sort in the same order."""
    count = job.layout.pp * job.layout.num_chunks * layers_per_chunk
    windowed = job.architecture.windowed_layers
    architecture = replace(
        job.architecture, num_layers=count, windowed_layers=windowed if windowed is None else windowed[:count]
    )
    return replace(job, architecture=architecture, layout=replace(job.layout, layers=None))


def peak_at_depth(job: Job, rehearse: Callable[[Job], RankMemory]) -> float:
    """Return the peak bytes of the job's first stage, from two shallow ones where all layers are alike."""
    layers = max(job.layout.layers or (job.architecture.num_layers // (job.layout.pp * job.layout.num_chunks),))
    if layers <= DEPTHS[1] or (job.architecture.experts and job.architecture.experts.first_layer):
        return rehearse(job).peak
    low, high = (rehearse(shallow(job, depth)) for depth in DEPTHS)
    steps = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return max(
        at_low.peak + (at_high.peak - at_low.peak) * steps
        for at_low, at_high in zip(low.phases, high.phases, strict=True)
    )


@dataclass(frozen=True)
class Searched:
    """What a search found. tried: how many neighbours were rehearsed; is_whole: whether there was time for all."""

    found: tuple[Found, ...]
    tried: int
    is_whole: bool


def search(job: Job, device: Device, rehearse: Callable[[Job], RankMemory], *, seconds: float) -> Searched:
    """Look for neighbours that fit, the fewest changes first, until there are WANTED of them or the time is over.

    rehearse: what the first kind of rank of a job needs. seconds: of this process's own time, so that a busy machine
    searches no less.
    """
    found: list[Found] = []
    tried, end = 0, time.process_time() + seconds
    for changes, other in neighbours(job):
        if len(found) == WANTED or time.process_time() > end:
            return Searched(tuple(found), tried, is_whole=False)
        if _at_least(other) + OVERHEAD_BYTES > device.memory:
            continue
        tried += 1
        needed = peak_at_depth(other, rehearse) + OVERHEAD_BYTES
        if needed <= device.memory:
            found.append(Found(changes, other, needed))
    return Searched(tuple(found), tried, is_whole=True)


def search_more_gpus(
    job: Job, device: Device, rehearse: Callable[[Job], RankMemory], *, seconds: float
) -> tuple[Found, ...]:
    """Return the job or a neighbour of it that fits on the smallest of some multiples of its GPUs; () for none.

    rehearse, seconds: see `search`.
    """
    end = time.process_time() + seconds
    for times in TIMES_THE_GPUS:
        world = times * job.layout.world_size
        if (larger := _job(job, {}, world)) is None:
            continue
        for changes, other in chain([((), larger)], neighbours(larger)):
            if time.process_time() > end:
                return ()
            if _at_least(other) + OVERHEAD_BYTES > device.memory:
                continue
            needed = peak_at_depth(other, rehearse) + OVERHEAD_BYTES
            if needed <= device.memory:
                return (Found(((WORLD_SIZE, world), *changes), other, needed),)
    return ()


def _at_least(job: Job) -> float:
    """Return bytes that a rank needs on any schedule: weights, reference, gradients, optimizer, of an equal share."""
    config, layout = job.config, job.layout
    share = num_parameters(job.architecture) / (layout.tp * layout.pp * layout.ep)
    weights = 4 if config.precision.dtype == "fp32" else 2
    copies = 2 if config.model.reference == "resident" else 1
    replicas = layout.dp * layout.cp if config.optimizer.distributed else 1
    return share * (copies * weights + 4 + (8 if weights == 4 else 12) / replicas)


def _job(job: Job, wanted: Mapping[str, object], world_size: int | None = None) -> Job | None:
    """Return the job with other settings, on as many GPUs or `world_size`; None where layout or batch cannot be so."""
    config = changed(job.config, wanted)
    try:
        layout = plan_layout(config, job.architecture, world_size or job.layout.world_size)
    except UserError:
        return None
    return replace(job, config=config, layout=layout)


def changed(config: Config, keys: Mapping[str, object]) -> Config:
    """Return the config with other values of dotted keys, such as parallel.tp."""
    sections: dict[str, dict[str, object]] = {}
    for key, value in keys.items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = value
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


def _value(config: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _distance(job: Job, other: Job) -> float:
    pairs = ((job.layout.tp, other.layout.tp), (job.layout.pp, other.layout.pp))
    return sum(abs(math.log2(there / here)) for here, there in pairs)
