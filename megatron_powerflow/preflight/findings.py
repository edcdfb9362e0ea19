"""Which node is at fault? Arithmetic over what all ranks reported, and the words for it.

A node is slow when its slowest rank needs `slow` times the usual for the same matrix products, or when even its best
link to a neighbour needs that. A link that is slow beside good ones of both its nodes stands in the table and is no
node's fault; of two nodes there is one link, which nothing can be compared with. What is usual is the lower quartile:
where half of the nodes are slow, the others are the measure.

Left out: ranks that do not come or fall silent (`roll_call.py`). No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_powerflow.errors import EXIT_REQUEUE, EXIT_USER_ERROR
from megatron_powerflow.parallel.devices import shared_devices
from megatron_powerflow.preflight.reports import Card, Measured, Report, Verdict

MOST_TAKEN_BYTES = 3 * 2**30  # of a GPU, that a display and our own CUDA context may hold
NAMED = 8  # ranks in a sentence


def usual(values: Iterable[float]) -> float:
    """Return the lower quartile, which is one of the values."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 4]


def names(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """Name ranks and their nodes. Example: ranks 2, 3 on n2."""
    some = ", ".join(map(str, ranks[:NAMED])) + (", ..." if len(ranks) > NAMED else "")
    places = ", ".join(dict.fromkeys(nodes[rank] for rank in ranks))
    return f"rank{'s' * (len(ranks) > 1)} {some} on {places}"


def of_cards(cards: Sequence[Card]) -> Verdict | None:
    """Judge what the ranks said when they came: None where they can go on.

    What every rank lacks is the user's mistake; what some lack is their nodes' fault.
    """
    nodes = [card.node for card in cards]
    if shared := shared_devices([card.device or f"none of rank {rank}" for rank, card in enumerate(cards)]):
        return Verdict(EXIT_USER_ERROR, tuple(shared))
    faults: dict[str, list[int]] = {}
    for rank, card in enumerate(cards):
        if card.fault:
            faults.setdefault(card.fault, []).append(rank)
    if not faults and len({card.backend for card in cards}) > 1:
        without = [rank for rank, card in enumerate(cards) if card.backend == "gloo"]
        faults["has no GPU, and other ranks have"] = without
    if not faults:
        return None
    faulty = sorted(rank for ranks in faults.values() for rank in ranks)
    lines = tuple(f"{names(ranks, nodes)}: {fault}" for fault, ranks in faults.items())
    if len(faulty) == len(cards):
        return Verdict(EXIT_USER_ERROR, lines)
    return Verdict(EXIT_REQUEUE, lines, _nodes(faulty, nodes))


def of_reports(reports: Sequence[Report], *, slow: float, paths: Sequence[str]) -> Verdict:
    """Judge what the ranks measured, by rank.

    slow: times the usual that make a node slow; 0: none is. paths: of the config, which every rank is to see.
    """
    nodes = [report.node for report in reports]
    lines, faulty = [], []
    for path in paths:
        blind = [report.rank for report in reports if path not in report.seen]
        if blind and len(blind) < len(reports):
            lines.append(f"{names(blind, nodes)}: {path} is not there, and other nodes see it; mount it on every node")
            faulty += blind
    for report in reports:
        if (report.taken_bytes or 0) > MOST_TAKEN_BYTES:
            taken = (report.taken_bytes or 0) / 2**30
            lines.append(f"{names([report.rank], nodes)}: others hold {taken:.1f} GiB of its GPU; end their processes")
            faulty.append(report.rank)
        if wrong := [group for group in report.groups if not group.is_right]:
            kinds = ", ".join(dict.fromkeys(group.kind for group in wrong))
            lines.append(
                f"{names([report.rank], nodes)}: a wrong sum over its group of {kinds}: memory or a link fails"
            )
            faulty.append(report.rank)
    for node, factor, what in slow_nodes(reports, slow):
        lines.append(f"{node} is slow: {factor:.1f} times the usual time for {what}")
        faulty += [report.rank for report in reports if report.node == node]
    return Verdict(EXIT_REQUEUE if lines else 0, tuple(lines), _nodes(faulty, nodes))


def slow_nodes(reports: Sequence[Report], slow: float) -> list[tuple[str, float, str]]:
    """Return each slow node with its factor and for what; the slowest first. slow: 0 for none."""
    if not slow:
        return []
    found = {
        node: (factor, what)
        for what, factors in (("its links", link_factors(reports)), ("matrix products", product_factors(reports)))
        for node, factor in factors.items()
        if factor > slow
    }
    return sorted(((node, *values) for node, values in found.items()), key=lambda item: -item[1])


def product_factors(reports: Sequence[Report]) -> dict[str, float]:
    """Return, for each node, the time of its slowest rank's matrix products over the usual one."""
    normal = usual(report.product_seconds for report in reports)
    factors: dict[str, float] = {}
    for report in reports:
        factors[report.node] = max(factors.get(report.node, 0.0), report.product_seconds / normal)
    return factors


def link_factors(reports: Sequence[Report]) -> dict[str, float]:
    """Return, for each node, the time of its best link over the usual one; {} below three nodes, or without links."""
    links = {group.ranks: group.large_seconds for group in slowest_views(reports) if group.kind == "nodes"}
    if not links or len({report.node for report in reports}) < 3:
        return {}
    normal = usual(links.values())
    factors: dict[str, float] = {}
    for ranks, seconds in links.items():
        for rank in ranks:
            node = reports[rank].node
            factors[node] = min(factors.get(node, float("inf")), seconds / normal)
    return factors


def slowest_views(reports: Sequence[Report]) -> list[Measured]:
    """Return each group once, as its slowest rank saw it, by kind in the order of the rounds."""
    seen: dict[tuple[str, tuple[int, ...]], Measured] = {}
    for report in reports:
        for group in report.groups:
            known = seen.get((group.kind, group.ranks))
            if known is None or group.large_seconds > known.large_seconds:
                seen[group.kind, group.ranks] = group
    return [*seen.values()]


def _nodes(ranks: Iterable[int], nodes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(nodes[rank] for rank in sorted(set(ranks))))
