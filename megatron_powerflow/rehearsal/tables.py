"""How is a rehearsal shown? Tables for people, one dictionary for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_powerflow.console import duration
from megatron_powerflow.rehearsal.devices import GIB
from megatron_powerflow.rehearsal.memory import OVERHEAD_BYTES, RankMemory, largest
from megatron_powerflow.rehearsal.rehearsal import Proposal, Rehearsal
from megatron_powerflow.rehearsal.save_interval import COPY_RATE, WRITE_RATE
from megatron_powerflow.rehearsal.step_time import ASSUMPTIONS

NOT_SEEN = (
    "Not seen here: what kernels allocate for themselves, what the allocator cannot use, numbers, whether ranks agree "
    "(`powerflow prove` runs the layout), whether FP8 and NCCL work on the machine."
)


def print_rehearsal(console: Console, rehearsal: Rehearsal) -> None:
    """Print all tables and lines of a rehearsal."""
    console.print(_memory_table(rehearsal))
    console.print(_traffic_table(rehearsal.ranks))
    for line in (*_lines(rehearsal), *_verdict(rehearsal)):
        console.print(line)
    for proposal in rehearsal.proposals:
        console.print(_proposal_line(proposal))
    console.print("assumes   " + ";\n          ".join(_assumptions(rehearsal)))
    console.print(NOT_SEEN)


def _memory_table(rehearsal: Rehearsal) -> Table:
    table = Table(title=f"GiB on each GPU, of {rehearsal.device.memory / GIB:.1f} ({rehearsal.device.name})")
    table.title_justify = "left"
    table.add_column("")
    for rank in rehearsal.ranks:
        table.add_column(f"{rank.name}\n{rank.count} ranks", justify="right")
    for part in dict.fromkeys(part for rank in rehearsal.ranks for part in rank.parts):
        table.add_row(part, *(_gib(rank.parts.get(part, 0)) for rank in rehearsal.ranks))
    table.add_section()
    for phase in rehearsal.ranks[0].phases:
        if phase.name != "micro-batches":
            peaks = (_gib(rank.phase(phase.name).peak) for rank in rehearsal.ranks)
            table.add_row(f"most in: {phase.name}", *peaks)
    table.add_section()
    table.add_row("context, NCCL, cuBLAS (assumed)", *(_gib(OVERHEAD_BYTES) for _ in rehearsal.ranks))
    table.add_row("needed", *(_gib(rank.needed) for rank in rehearsal.ranks))
    return table


def _traffic_table(ranks: tuple[RankMemory, ...]) -> Table:
    table = Table(title="collectives of a rank in the rehearsed micro-batches: number, GiB", title_justify="left")
    for column in ("phase", "group"):
        table.add_column(column)
    for rank in ranks:
        table.add_column(rank.name, justify="right")
    for phase in (phase.name for phase in ranks[0].phases):
        groups = dict.fromkeys(group for rank in ranks for group in rank.traffic(phase))
        for group in groups:
            cells = (rank.traffic(phase).get(group) for rank in ranks)
            table.add_row(phase, group, *(f"{cell.count:,}  {_gib(cell.num_bytes)}" if cell else "-" for cell in cells))
    return table


def _lines(rehearsal: Rehearsal) -> list[str]:
    time, host = rehearsal.time, rehearsal.host
    saves = rehearsal.saves
    rollout = f"rollout {duration(time.rollout)} (bound by {time.bound_by})"
    if rehearsal.job.is_served:
        rollout = "without sampling and updates of servers, which are not modelled"
    swapped = f" + {_gib(host.swapped)} for the swapped reference" if host.swapped else ""
    return [
        f"step      about {duration(time.total)}: {rollout}, "
        f"reference {duration(time.reference)}, update {duration(time.update)}, optimizer {time.optimizer:.1f} s",
        f"          {time.flops:.3g} FLOPs, {time.utilisation:.1%} of the GPUs' peak; {time.idle_share:.1%} of scoring "
        "and updating a stage waits for others",
        f"host      a node of {host.processes} processes: {_gib(host.loading)} GiB while weights are read, "
        f"{_gib(host.saved_copy)} while a checkpoint is written"
        f"{swapped}; a checkpoint is {_gib(host.checkpoint)} GiB on the disk",
        f"saves     delay training by {duration(saves.delay)} each, are on the disk after {duration(saves.written)}, "
        f"and pay every {duration(saves.seconds)} (Young, Daly): checkpoint.interval={saves.steps}",
    ]


def _assumptions(rehearsal: Rehearsal) -> list[str]:
    return [
        *ASSUMPTIONS,
        f"a node fails every {rehearsal.saves.node_hours:,.0f} hours (--node-hours; Llama 3: 6,335) and writes "
        f"{WRITE_RATE / 1e9:g} GB/s; a GPU copies {COPY_RATE / 1e9:g} GB/s into host memory",
    ]


def _verdict(rehearsal: Rehearsal) -> list[str]:
    worst, memory = largest(rehearsal.ranks), rehearsal.device.memory
    needs = f"{worst.name} needs {_gib(worst.needed)} of {_gib(memory)} GiB, most in {worst.peak_phase}"
    if worst.needed <= memory < rehearsal.with_servers:
        share = rehearsal.job.config.rollout.vllm.memory
        return [
            f"DOES NOT FIT {rehearsal.device.name}: a server takes rollout.vllm.memory={share:g} of the GPU while the "
            f"trainer rests on it, together {_gib(rehearsal.with_servers)} of {_gib(memory)} GiB",
            "          lower rollout.vllm.memory, or take model.reference=swap or more GPUs, which rest with less",
        ]
    if rehearsal.with_servers:
        needs += f"; {_gib(rehearsal.with_servers)} while a server is awake on it"
    if rehearsal.fits:
        return [f"fits      {rehearsal.device.name}: {needs}"]
    lines = [f"DOES NOT FIT {rehearsal.device.name}: {needs}"]
    if not rehearsal.proposals and (searched := rehearsal.searched) is not None:
        why = "all there are" if searched.is_whole else "there was no time for more"
        lines.append(
            f"          nor does any of {searched.tried} neighbours that were tried ({why}), nor what was tried with"
        )
        lines.append("          more GPUs and the same batch; take many more GPUs, larger ones, or a smaller model")
    return lines


def _proposal_line(proposal: Proposal) -> str:
    worst = largest(proposal.ranks)
    keys = " ".join(f"{key}={_word(value)}" for key, value in proposal.found.changes)
    return f"would fit {keys}: {_gib(worst.needed)} GiB, a step of about {duration(proposal.time.total)}"


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f}"


def rehearsal_json(rehearsal: Rehearsal) -> dict[str, Any]:
    """Return a rehearsal for programs; sizes in bytes, times in seconds."""
    return {
        "layout": rehearsal.job.layout.describe(),
        "device": dataclasses.asdict(rehearsal.device),
        "fits": rehearsal.fits,
        "with_servers_bytes": rehearsal.with_servers,
        "overhead_bytes": OVERHEAD_BYTES,
        "ranks": [_rank_json(rank) for rank in rehearsal.ranks],
        "step_seconds": dataclasses.asdict(rehearsal.time) | {"total": rehearsal.time.total},
        "host_bytes": dataclasses.asdict(rehearsal.host),
        "saves": dataclasses.asdict(rehearsal.saves),
        "searched": rehearsal.searched and {"tried": rehearsal.searched.tried, "all": rehearsal.searched.is_whole},
        "proposals": [
            {
                "changes": dict(proposal.found.changes),
                "ranks": [_rank_json(rank) for rank in proposal.ranks],
                "step_seconds": proposal.time.total,
            }
            for proposal in rehearsal.proposals
        ],
        "assumptions": _assumptions(rehearsal),
        "not_seen": NOT_SEEN,
    }


def _rank_json(rank: RankMemory) -> dict[str, Any]:
    phases = {
        phase.name: {
            "before": phase.before,
            "after": phase.after,
            "peak": phase.peak,
            "collectives": {name: dataclasses.asdict(traffic) for name, traffic in phase.traffic.items()},
        }
        for phase in rank.phases
    }
    sizes = {"needed": rank.needed, "loading": rank.loading, "parts": rank.parts}
    return {"name": rank.name, "count": rank.count, **sizes, "phases": phases}
