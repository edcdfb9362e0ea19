"""On how many processes does a layout show everything that it can do wrong? Arithmetic only: no torch, no processes.

Two ranks of a kind exchange what eight would: a matrix in two parts, two replicas. So each size becomes at most 2. What
two cannot show is kept: a stage between the first and the last needs a third, experts that have replicas as well as
parts need twice as many ranks, and where several tensor-parallel ranks share a query group (`small_model.py`), they
still do.

Left out: the model that such a layout can split (`small_model.py`).
"""

from __future__ import annotations

from dataclasses import replace

from megatron_powerflow.config import Config
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.layout import Layout, balanced_layers

SMALL = 2
STAGES = 3  # one of them receives and sends
MOST_PROCESSES = 32


def job_size(config: Config) -> int:
    """Return the number of processes of a job that nobody has given: two replicas, or as many as experts need.

    One replica where two could not share the prompts of an update.
    """
    parallel = config.parallel
    prompts = config.rollout.prompts_per_step // config.optimizer.updates_per_rollout
    replicas = 1 if prompts % 2 else 2
    while parallel.cp * replicas % parallel.ep and replicas < parallel.ep:
        replicas += 1
    return parallel.tp * parallel.cp * parallel.pp * replicas


def small_layout(layout: Layout) -> Layout:
    """Return the layout of at most 2 of each kind, and 3 stages, that stands for this one; at most 24 processes."""
    small = replace(
        layout,
        tp=min(layout.tp, SMALL),
        pp=min(layout.pp, STAGES),
        vpp=layout.vpp and min(layout.vpp, SMALL),
        cp=min(layout.cp, SMALL),
        ep=min(layout.ep, SMALL),
        dp=min(layout.dp, SMALL),
        sequence_parallel=layout.sequence_parallel,
        layers=None,
    )
    if layout.layers is not None and small.pp > 1:  # unequal there, unequal here
        chunks = small.pp * small.num_chunks
        small = replace(small, layers=balanced_layers(2 * chunks + 1, chunks))
    experts_have_replicas = 1 < layout.ep < layout.cp * layout.dp
    if experts_have_replicas and small.cp * small.dp == small.ep:
        small = replace(small, dp=2 * small.dp) if layout.dp > 1 else replace(small, cp=2 * small.cp)
    return small


def require_few(layout: Layout) -> None:
    """Raise UserError where a machine is not to start so many processes."""
    if layout.world_size <= MOST_PROCESSES:
        return
    raise UserError(
        f"--full means {layout.describe()}, and a proof starts at most {MOST_PROCESSES} on one machine; leave --full "
        f"away ({small_layout(layout).world_size} processes stand for them), or give smaller sizes, such as "
        f"parallel.tp=2 or --world-size {layout.tp * layout.cp * layout.pp}"
    )


def differences(layout: Layout, small: Layout) -> list[str]:
    """Return what the small layout has less of, for people, such as `tp 8 as 2`."""
    names = ("tp", "pp", "vpp", "cp", "ep", "dp")
    return [
        f"{name} {getattr(layout, name)} as {getattr(small, name)}"
        for name in names
        if getattr(layout, name) != getattr(small, name)
    ]
