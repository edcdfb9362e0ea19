"""What do people and programs read of a pre-flight? A line for each kind of group, and one for each node."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_powerflow.preflight.findings import link_factors, names, product_factors, slowest_views, usual
from megatron_powerflow.preflight.rank_groups import KINDS, LARGE_BYTES
from megatron_powerflow.preflight.reports import Report

MOST_NODES = 16  # in the table, the slowest first


def group_rows(reports: Sequence[Report]) -> list[dict]:
    """Return what was measured of each kind of group, in the order of KINDS. Seconds are those of a usual group.

    gb_per_second: that each rank sends, 2 (n - 1) / n of the large message in an all-reduce, in the slowest group.
    """
    rows = []
    views = slowest_views(reports)
    for kind in KINDS:
        groups = [group for group in views if group.kind == kind]
        if not groups:
            continue
        slowest = max(groups, key=lambda group: group.large_seconds)
        size = len(slowest.ranks)
        rows.append(
            {
                "kind": kind,
                "num_groups": len(groups),
                "size": size,
                "small_seconds": usual(group.small_seconds for group in groups),
                "large_seconds": usual(group.large_seconds for group in groups),
                "slowest_seconds": slowest.large_seconds,
                "slowest_ranks": list(slowest.ranks),
                "gb_per_second": 2 * (size - 1) / size * LARGE_BYTES / slowest.large_seconds / 1e9,
            }
        )
    return rows


def node_rows(reports: Sequence[Report]) -> list[dict]:
    """Return what was measured of each node, the slowest first. Factors are times the usual; link: its best link's."""
    links, products = link_factors(reports), product_factors(reports)
    rows = [
        {
            "node": node,
            "ranks": [report.rank for report in reports if report.node == node],
            "product_seconds": max(report.product_seconds for report in reports if report.node == node),
            "product_factor": factor,
            "link_factor": links.get(node),
        }
        for node, factor in products.items()
    ]
    return sorted(rows, key=lambda row: -max(row["product_factor"], row["link_factor"] or 0.0))


def describe(reports: Sequence[Report], backend: str, seconds: float) -> str:
    """Write both tables for people. seconds: that the pre-flight took, from the first rank's start."""
    nodes = [report.node for report in reports]
    lines = [
        f"pre-flight: {len(reports)} rank{'s' * (len(reports) > 1)} on {len(set(nodes))} node(s) over {backend}, "
        f"{seconds:.1f} s"
    ]
    rows = group_rows(reports)
    if rows:
        lines.append(
            f"{'group':7}{'':16}{'small, ms':>11}{'16 MiB, ms':>12}{'slowest, ms':>13}{'GB/s':>8}  slowest group"
        )
    for row in rows:
        count = f"{row['num_groups']} of {row['size']} ranks"
        lines.append(
            f"{row['kind']:7}{count:16}{1e3 * row['small_seconds']:11.3f}{1e3 * row['large_seconds']:12.2f}"
            f"{1e3 * row['slowest_seconds']:13.2f}{row['gb_per_second']:8.2f}  {names(row['slowest_ranks'], nodes)}"
        )
    lines.append(f"{'node':20}{'ranks':>7}{'products, ms':>14}{'x usual':>9}{'best link, x usual':>20}")
    rows = node_rows(reports)
    for row in rows[:MOST_NODES]:
        link = "" if row["link_factor"] is None else f"{row['link_factor']:.1f}"
        lines.append(
            f"{row['node']:20}{len(row['ranks']):7}{1e3 * row['product_seconds']:14.2f}{row['product_factor']:9.1f}"
            f"{link:>20}"
        )
    if len(rows) > MOST_NODES:
        lines.append(f"... and {len(rows) - MOST_NODES} faster ones")
    return "\n".join(lines)
