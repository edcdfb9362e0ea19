"""Which ranks talk to each other in a run of this layout, and in which order are they tried?

In each round a rank is in one group at most, so that no group's measurement waits for another's. Pairs of pipeline
neighbours, and of neighbouring nodes, overlap: they take two rounds, or three where a ring of nodes has an odd length.

    tp cp ep dp    as in training (`parallel/layout.py`: ranks count through tp, then cp, dp, pp)
    pp             a stage and the next one, of the same replica
    nodes          a node and the next one, by each of their ranks: nodes in a ring, which tells a slow node from a link
    all            every rank

Arithmetic only; groups of one rank are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from megatron_powerflow.parallel.layout import Layout

KINDS = ("tp", "cp", "ep", "dp", "pp", "nodes", "all")
LARGE_BYTES = 2**24  # of the larger message that a group is tried with


class Round(NamedTuple):
    """Groups of one kind that are tried at the same time; no rank is in two of them."""

    kind: str
    groups: tuple[tuple[int, ...], ...]


def rounds(layout: Layout, nodes: Sequence[str]) -> list[Round]:
    """Return the rounds of a layout, in their order. nodes: the node of each rank."""
    tp, cp, dp = layout.tp, layout.cp, layout.dp
    stage = tp * cp * dp
    found = [
        Round("tp", _along(layout.world_size, 1, tp)),
        Round("cp", _along(layout.world_size, tp, cp)),
        Round("ep", tuple(tuple(ranks) for ranks in layout.expert_ranks)),
        Round("dp", _along(layout.world_size, tp * cp, dp)),
    ]
    for first in range(min(2, layout.pp - 1)):
        stages = range(first, layout.pp - 1, 2)
        pairs = ((rank, rank + stage) for s in stages for rank in range(s * stage, (s + 1) * stage))
        found.append(Round("pp", tuple(pairs)))
    found += [Round("nodes", pairs) for pairs in _rings(nodes)]
    found.append(Round("all", (tuple(range(layout.world_size)),)))
    return [round for round in found if round.groups and len(round.groups[0]) > 1]


def _along(world_size: int, stride: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Groups of `size` ranks that are `stride` apart."""
    firsts = (rank for rank in range(world_size) if rank // stride % size == 0)
    return tuple(tuple(range(first, first + stride * size, stride)) for first in firsts)


def _rings(nodes: Sequence[str]) -> list[tuple[tuple[int, int], ...]]:
    """Rounds of pairs of ranks, of neighbouring nodes in a ring: the first rank of each, the second of each, ..."""
    ranks: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    members = [*ranks.values()]
    count = len(members)
    if count < 2:
        return []
    links = [(i, (i + 1) % count) for i in range(count if count > 2 else 1)]
    odd_one = [links.pop()] if count > 2 and count % 2 else []  # it has a node of the first and of the last link
    colours = [links[::2], links[1::2], odd_one]
    return [
        tuple(
            (min(a, b), max(a, b)) for one, other in links for a, b in zip(members[one], members[other], strict=False)
        )
        for links in colours
        if links
    ]
