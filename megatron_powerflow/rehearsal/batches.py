"""Which micro-batches does a rank train on when every rollout is as long as it may be?

Left out: that rollouts differ. Micro-batches of shorter ones are smaller, or are fewer.
"""

from __future__ import annotations

import math

from megatron_powerflow.data.packing import AnnotatedRollout, pack, pack_streams
from megatron_powerflow.model.length_step import CUDA_LENGTH_STEP
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import MicroBatch, Prompt, Rollout
from megatron_powerflow.rehearsal.job import Job
from megatron_powerflow.training.micro_batches import Packing, bin_rule


def rollouts_per_micro_batch(job: Job) -> int:
    """Return how many of the longest rollouts a micro-batch holds, of those that an update has."""
    padded = job.config.parallel.micro_batch_size
    if padded is not None:
        return padded
    rule = bin_rule(job.layout, job.config)
    held = rule.capacity // rule.padded(job.longest)
    return max(1, min(held, -(-_rollouts_of_rank(job) // rule.fewest)))


def num_micro_batches(job: Job) -> int:
    """Return how many micro-batches of the longest rollouts a rank has in an update."""
    count = -(-_rollouts_of_rank(job) // rollouts_per_micro_batch(job))
    return -(-count // job.layout.pp) * job.layout.pp if job.layout.vpp else count


def _rollouts_of_rank(job: Job) -> int:
    config = job.config
    steps = config.rollout.buffer_steps + 1
    rollouts = config.rollout.prompts_per_step * config.rollout.responses_per_prompt * steps
    return rollouts // config.optimizer.updates_per_rollout // job.layout.dp


def rehearsed_micro_batches(job: Job) -> int:
    """Return how many micro-batches are enough for a rank to come to its most in flight, and to go on from there.

    Interleaved stages have fewer than pp (vpp + 1) pieces in flight, of vpp in a micro-batch.
    """
    pp = job.layout.pp
    enough = 2 * pp if job.layout.vpp else pp + 1
    return min(num_micro_batches(job), enough)


def scored_micro_batches(job: Job) -> int:
    """Return how many micro-batches the scoring phase is rehearsed with: they go one after the other, so that more need
    no more memory. Interleaved stages take turns of pp."""
    return min(rehearsed_micro_batches(job), job.layout.pp if job.layout.vpp else 2)


def micro_batches(job: Job, groups: Groups) -> list[MicroBatch]:
    """Return the micro-batches of a rank, as many as are rehearsed."""
    rollout = job.config.rollout
    prompt = Prompt("longest", 0, (0,) * rollout.max_prompt_tokens)
    size, count = rollouts_per_micro_batch(job), rehearsed_micro_batches(job)
    length = rollout.max_response_tokens
    longest = [
        AnnotatedRollout(Rollout(prompt, 0, index, (0,) * length, (0.0,) * length, "length"))
        for index in range(size * count)
    ]
    packing: Packing = {
        "responses_per_prompt": rollout.responses_per_prompt,
        "drop_truncated": False,
        "uniform": True,
        "device": groups.device,
        "cp_rank": groups.cp_rank,
        "cp_size": groups.cp_size,
    }
    if job.config.parallel.micro_batch_size is None:
        bins = [longest[first : first + size] for first in range(0, len(longest), size)]
        return pack_streams(bins, bin_rule(job.layout, job.config), **packing)
    multiple = job.layout.position_multiple(job.config.precision)
    multiple = math.lcm(multiple, CUDA_LENGTH_STEP) if job.on == "cuda" else multiple
    return pack(longest, micro_batch_size=size, multiple=multiple, **packing)
