"""How long does a step take? A model of it, every assumption of which is a number in this file.

    rollout     passes x (launches of the layers, or reading weights and cache, whichever takes longer, + small sums)
    reference   one forward pass, update: three, four with full recomputation; over the rate of matrix products
    idle        of the pipeline: (pp - 1) / (vpp m + pp - 1) of scoring and updating, m micro-batches
    optimizer   the sums over replicas and what Adam reads and writes

It says which part is the largest and what a change of layout does to it. It is no measurement: nothing here has been
compared with a GPU.

Left out: what vLLM servers take where they sample; overlap of sums with computing, slow responses among quick ones,
loading, evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_powerflow.data.bins import active_weights, flop_count
from megatron_powerflow.rehearsal.batches import num_micro_batches, rehearsed_micro_batches, scored_micro_batches
from megatron_powerflow.rehearsal.devices import GPUS_PER_NODE, Device
from megatron_powerflow.rehearsal.job import Job
from megatron_powerflow.rehearsal.memory import RankMemory

MATRIX_SHARE = 0.5  # of the peak that matrix products reach
MEMORY_SHARE = 0.7  # of the memory's rate that decoding reaches
LINK_SHARE = 0.7  # of a link's rate that collectives reach
LAUNCH_SECONDS = 5e-4  # of a layer of one decoding pass, eager: Python and some dozens of launches
SMALL_SUM_SECONDS = 2e-5  # an all-reduce of a few rows within a node
HOP_SECONDS = 3e-5  # hidden states of a few rows to the next stage

ASSUMPTIONS = (
    f"matrix products reach {MATRIX_SHARE:.0%} of the device's peak, decoding {MEMORY_SHARE:.0%} of its memory's rate, "
    f"collectives {LINK_SHARE:.0%} of a link's",
    f"a layer of an eager decoding pass takes {LAUNCH_SECONDS * 1e3:g} ms to launch, a small sum over tp "
    f"{SMALL_SUM_SECONDS * 1e6:g} us, a hop to the next stage {HOP_SECONDS * 1e6:g} us",
    "every response is as long as it may be; nothing overlaps",
)


@dataclass(frozen=True, slots=True)
class StepTime:
    """The seconds of a step by phase, and what they come from.

    flops: of the whole step and run. idle_share: of scoring and updating, in which a stage waits for others.
    utilisation: flops over what all GPUs could do in that time.
    """

    rollout: float
    reference: float
    update: float
    optimizer: float
    flops: float
    idle_share: float
    utilisation: float
    bound_by: str

    @property
    def total(self) -> float:
        """The seconds of the step."""
        return self.rollout + self.reference + self.update + self.optimizer


def step_time(job: Job, ranks: Sequence[RankMemory], device: Device) -> StepTime:
    """Return the modelled time of a step. ranks: what was rehearsed, for its bytes and collectives."""
    config, layout = job.config, job.layout
    rollouts = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    forward = flop_count(job.architecture)(job.longest) * rollouts
    steps = config.rollout.buffer_steps + 1  # whose rollouts a step trains on; the reference scores its own
    prefill = flop_count(job.architecture)(config.rollout.max_prompt_tokens) * config.rollout.prompts_per_step
    passes = 4 if config.model.recompute == "full" else 3
    rate = device.flops(config.precision.dtype) * MATRIX_SHARE * layout.world_size
    count = num_micro_batches(job)
    idle = (layout.pp - 1) / (layout.num_chunks * count + layout.pp - 1)
    rollout, bound_by, decoding = 0.0, "servers", 0.0
    if job.is_served:
        prefill = 0.0
    else:
        rollout, bound_by = _rollout(job, ranks, device)
        rollout += prefill / rate
        decoding = 2 * active_weights(job.architecture) * rollouts * config.rollout.max_response_tokens
    reference = forward / rate / (1 - idle) + _sent(job, ranks, device, "reference scores") / steps
    update = passes * steps * forward / rate / (1 - idle) + _sent(job, ranks, device, "update")
    optimizer = _optimizer(job, ranks, device) * config.optimizer.updates_per_rollout
    flops = prefill + (1 + passes * steps) * forward + decoding
    total = rollout + reference + update + optimizer
    peak = device.flops(config.precision.dtype) * layout.world_size
    return StepTime(rollout, reference, update, optimizer, flops, idle, flops / total / peak, bound_by)


def _rollout(job: Job, ranks: Sequence[RankMemory], device: Device) -> tuple[float, str]:
    """Return the seconds of all decoding passes, and what they wait for."""
    config, layout = job.config, job.layout
    samplers = layout.dp * layout.cp
    prompts = math.ceil(config.rollout.prompts_per_step / samplers)
    at_a_time = min(prompts, max(1, config.rollout.max_concurrent_rows // config.rollout.responses_per_prompt))
    batches = min(layout.pp, at_a_time)
    worst = max(ranks, key=lambda rank: rank.parts["KV cache"] + rank.parts["weights"])
    read = (worst.parts["weights"] + worst.parts["KV cache"] / 2 / batches) / (device.memory_rate * MEMORY_SHARE)
    layers = job.architecture.num_layers / layout.pp
    launch = layers * LAUNCH_SECONDS
    sums = 2 * layers * SMALL_SUM_SECONDS if layout.tp > 1 else 0.0
    stage = max(launch, read) + sums + (HOP_SECONDS if layout.pp > 1 else 0.0)
    # a batch comes back after all stages; with fewer batches than stages some wait
    token = stage * max(layout.pp, batches)
    rounds = math.ceil(prompts / at_a_time)
    return rounds * config.rollout.max_response_tokens * token, "launches" if launch > read else "memory"


def _sent(job: Job, ranks: Sequence[RankMemory], device: Device, phase: str) -> float:
    """Return the seconds of a phase's collectives over tp, cp, ep and pp, for all micro-batches of a rank."""
    rehearsed = rehearsed_micro_batches(job) if phase == "update" else scored_micro_batches(job)
    factor = num_micro_batches(job) / rehearsed
    seconds = 0.0
    for group, rate in (
        ("tp", device.link_rate),
        ("cp", device.link_rate),
        ("ep", device.network_rate),
        ("pp", device.network_rate),
    ):
        if group == "tp" and job.layout.tp > GPUS_PER_NODE:
            rate = device.network_rate
        most = max((rank.traffic(phase)[group].num_bytes for rank in ranks if group in rank.traffic(phase)), default=0)
        seconds += most * factor / (rate * LINK_SHARE)
    return seconds


def _optimizer(job: Job, ranks: Sequence[RankMemory], device: Device) -> float:
    worst = max(ranks, key=lambda rank: rank.gradients)
    over_replicas = (
        2 * worst.gradients / (device.network_rate * LINK_SHARE) if job.layout.dp * job.layout.cp > 1 else 0.0
    )
    return over_replicas + 3 * worst.parts["optimizer"] / (device.memory_rate * MEMORY_SHARE)
