"""Which pictures stand in which section, and what does a line look like beside a table?

The only importer of the pictures, so that reading and tables work where matplotlib is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.markers import MarkerStyle

from megatron_powerflow.report.accuracy_and_length import (
    draw_accuracy_against_length,
    draw_accuracy_by_step,
)
from megatron_powerflow.report.arms import Arm
from megatron_powerflow.report.frontier import draw_frontier
from megatron_powerflow.report.log_z_curves import draw_log_z, draw_residual_fan
from megatron_powerflow.report.pass_at_k import draw_pass_at_k
from megatron_powerflow.report.pictures import Cast, Picture, cast
from megatron_powerflow.report.plot_style import LineStyle
from megatron_powerflow.report.training_curves import draw_training_curves

# (anchor, title, pictures, what has to be there for one)
SECTIONS: tuple[tuple[str, str, tuple[Callable[[Cast], Picture | None], ...], str], ...] = (
    (
        "accuracy",
        "Accuracy, KL, truncated share, length",
        (draw_accuracy_against_length, draw_accuracy_by_step),
        "evaluations with an accuracy and a mean response length",
    ),
    ("training", "Training curves", (draw_training_curves,), "metrics.jsonl"),
    (
        "diversity",
        "Quality against diversity",
        (draw_frontier,),
        "an accuracy or a judged quality together with a diversity (distinct-n, embedding distance)",
    ),
    ("pass-at-k", "pass@k", (draw_pass_at_k,), "pass@k for two values of k"),
    (
        "log-z",
        "log Z′, residuals, the repetition trap",
        (draw_log_z, draw_residual_fan),
        "log Z′, its weighted mean residual or quantiles of the residual in metrics.jsonl",
    ),
)


@dataclass(frozen=True, slots=True)
class PageSection:
    """A section of the page holds its pictures, or says what a run needs to have for one."""

    anchor: str
    title: str
    pictures: tuple[Picture, ...]
    needs: str  # shown where there is no picture


def draw_all(arms: Sequence[Arm]) -> tuple[list[PageSection], tuple[LineStyle, ...]]:
    """Draw every section's pictures for which there are numbers. Returns the sections, and the style of each arm."""
    all_arms = cast(arms)
    sections = [
        PageSection(anchor, title, tuple(picture for draw in draws if (picture := draw(all_arms))), needs)
        for anchor, title, draws, needs in SECTIONS
    ]
    return sections, all_arms.styles


def swatch(style: LineStyle) -> str:
    """Draw a line with its marker as inline SVG, 46 by 14 pixels."""
    marker = MarkerStyle(style.marker)
    outline = marker.get_path().transformed(marker.get_transform())
    points = " ".join(f"{23 + 8 * x:.1f},{7 - 8 * y:.1f}" for x, y in np.asarray(outline.to_polygons()[0]))
    dashes = ",".join(f"{1.9 * length:.1f}" for length in style.dashes) or "none"
    return (
        '<svg class="swatch" width="46" height="14" viewBox="0 0 46 14" aria-hidden="true">'
        f'<line x1="1" y1="7" x2="45" y2="7" stroke="{style.color}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        f'<polygon points="{points}" fill="{style.color}" stroke="white" stroke-width="0.6"/></svg>'
    )
