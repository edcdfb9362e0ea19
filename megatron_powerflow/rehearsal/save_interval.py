"""How often is it worth saving? Every sqrt(2 x delay x time between failures), by Young (1974) and Daly (2006).

The delay is what training loses by a save: the copy into host memory where saves are asynchronous, else all of the
writing. Saves do not overlap, so that none is closer to the one before than its writing takes.

Left out: that a node may be slow before it fails, and the time of a restart, which does not depend on the interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_powerflow.rehearsal.devices import GPUS_PER_NODE
from megatron_powerflow.rehearsal.job import Job

# Llama 3 (arXiv 2407.21783, section 3.3.4): 419 unexpected interruptions in 54 days of 16,384 GPUs, 2,048 nodes.
NODE_HOURS_BETWEEN_FAILURES = 54 * 24 * 2048 / 419
WRITE_RATE = 1e9  # bytes a second that a node writes
COPY_RATE = 5e9  # bytes a second that a GPU copies into host memory


@dataclass(frozen=True, slots=True)
class Saves:
    """delay: seconds that training loses by one. written: seconds until one is on the disk. steps, seconds: from one to
    the next. node_hours: between two failures of a node."""

    delay: float
    written: float
    steps: int
    seconds: float
    node_hours: float


def save_interval(
    job: Job, checkpoint_bytes: int, step_seconds: float, *, delay: float | None = None, node_hours: float | None = None
) -> Saves:
    """Return how often to save. checkpoint_bytes: of all ranks. delay, node_hours: where they were measured."""
    nodes = max(1, math.ceil(job.layout.world_size / GPUS_PER_NODE))
    written = checkpoint_bytes / (nodes * WRITE_RATE)
    if delay is None:
        copied = checkpoint_bytes / (job.layout.world_size * COPY_RATE)
        delay = copied if job.config.checkpoint.asynchronous else written
    if node_hours is None:
        node_hours = NODE_HOURS_BETWEEN_FAILURES
    seconds = max(written, math.sqrt(2 * delay * node_hours * 3600 / nodes))
    return Saves(delay, written, max(1, round(seconds / step_seconds)), seconds, node_hours)
