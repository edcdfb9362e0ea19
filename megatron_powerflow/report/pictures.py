"""What do all pictures of a report share? Size, legend, bands, how numbers too far apart are scaled, the PNG.

Left out: which numbers are shown. Each picture is a file of its own that `drawing.py` names, with a function
`draw(cast) -> Picture | None`.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from megatron_powerflow.metrics.names import heading
from megatron_powerflow.report.arms import Arm
from megatron_powerflow.report.plot_style import STYLE, LineStyle, line_styles
from megatron_powerflow.report.seeds import Band, band

WIDTH = 11.0  # inches; CSS_WIDTH pixels on the page where there is room
CSS_WIDTH = 1056
MARKS = 8  # markers along a curve
GREY = "#555555"
LEVEL_DASHES = (4.0, 2.5)
LABEL_CHARACTERS = 34  # of a legend's line
FAR_APART = 30.0  # between arms or within one: then the axis is logarithmic
ROUNDING = 1e-3  # an axis around 0 goes so far at least: what is smaller is rounding, and would look like noise


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel shows one metric of metrics.jsonl over steps.

    `name` is drawn with band and markers, `thin` (another metric) as a thin line in the arm's colour; `note` ends
    the title; `around_0`: the values lie on both sides of 0.
    """

    name: str
    note: str = ""
    thin: str | None = None
    around_0: bool = False

    @property
    def title(self) -> str:
        """Return the metric's heading with the panel's note."""
        return heading(self.name) + (f"; {self.note}" if self.note else "")


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture is one PNG of the page. name: the stem of its file; alt: what it shows, for readers who cannot see
    it; notes: what it leaves out, and why."""

    name: str
    title: str
    alt: str
    caption: str
    png: bytes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cast:
    """A cast lists the arms in order, each with the style that it has in every picture."""

    arms: tuple[Arm, ...]
    styles: tuple[LineStyle, ...]

    def pairs(self) -> list[tuple[Arm, LineStyle]]:
        """Return each arm with its style."""
        return list(zip(self.arms, self.styles, strict=True))


def cast(arms: Sequence[Arm]) -> Cast:
    """Give every arm a style. Arms that were only evaluated are dashed, with black-edged markers."""
    styles = [
        style if arm.trained else replace(style, dashes=LEVEL_DASHES, edge="black", width=1.5)
        for arm, style in zip(arms, line_styles(len(arms)), strict=True)
    ]
    return Cast(tuple(arms), tuple(styles))


def panels(count: int, *, columns: int = 2, height: float = 3.5) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels, within `in_style()`, and return it with its axes. height: inches of a row."""
    columns = min(columns, count)
    rows = ceil(count / columns)
    gaps = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.03, wspace=0.03)
    figure = Figure(figsize=(WIDTH, rows * height), layout=gaps)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[index // columns, index % columns]) for index in range(count)]


def in_style():
    """Return the context to draw in, which gives the same picture whatever this machine's matplotlibrc says."""
    return rc_context({**STYLE})


def finish(figure: Figure, shown: Sequence[tuple[Arm, LineStyle]], extra: Sequence[Line2D] = ()) -> bytes:
    """Add the legend below the panels, make the figure taller by as much, and return it as PNG bytes.

    The PNG states no date and no version, so that the same numbers give the same bytes.
    """
    handles = [_handle(arm, style) for arm, style in shown] + list(extra)
    if handles:
        columns = _legend_columns(handles)
        heights = [str(handle.get_label()).count("\n") + 1 for handle in handles]
        lines = sum(max(heights[start : start + columns]) for start in range(0, len(handles), columns))
        figure.set_figheight(figure.get_figheight() + 0.25 * lines + 0.15)
        along_rows = [handle for start in range(columns) for handle in handles[start::columns]]  # matplotlib goes down
        figure.legend(handles=along_rows, loc="outside lower center", ncols=columns)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _legend_columns(handles: Sequence[Line2D]) -> int:
    """Return how many columns fit. Each is as wide as its longest label: 7.8 points a character, and 75."""
    widths = [75 + 7.8 * max(map(len, str(handle.get_label()).split("\n"))) for handle in handles]
    fitting = [n for n in range(1, len(widths) + 1) if sum(max(widths[at::n]) for at in range(n)) <= WIDTH * 72]
    return max(fitting, default=1)


def wrapped(label: str, characters: int = LABEL_CHARACTERS) -> str:
    """Break a label into lines. A space goes before a leading underscore, which matplotlib would not show."""
    text = textwrap.fill(label, characters)
    return f" {text}" if text.startswith("_") else text


def _handle(arm: Arm, style: LineStyle) -> Line2D:
    return Line2D([], [], **style.marked(), label=wrapped(arm.label))


def draw_band(axis: Axes, style: LineStyle, per_seed: Sequence[Mapping[int, float]], *, thin: bool = False) -> bool:
    """Draw the mean over seeds as a line and shade from the lowest to the highest seed.

    thin: draw the line alone, as a second quantity of the panel. Returns False, and draws nothing, where there are
    no values.
    """
    curve = band(per_seed)
    if curve is None:
        return False
    if thin:
        axis.plot(curve.steps, curve.mean, color=style.color, linewidth=1.0, zorder=3)
        return True
    axis.plot(curve.steps, curve.mean, **style.marked(), markevery=marks(curve, style))
    if len(per_seed) > 1:
        axis.fill_between(curve.steps, curve.low, curve.high, color=style.color, alpha=0.17, linewidth=0)
    return True


def marks(curve: Band, style: LineStyle) -> list[int]:
    """Return the indices of the points that get a marker: few, and at other points for other arms."""
    count = len(curve)
    if count <= MARKS:
        return list(range(count))
    every = count / MARKS
    shift = int(style.color[1:], 16) % 97 / 97
    return sorted({min(count - 1, int((mark + shift) * every)) for mark in range(MARKS)})


def scale_to(axis: Axes, series: Sequence[Mapping[int, float]], *, signed: bool) -> str:
    """Make the y axis logarithmic where sizes are far apart, or symlog where values may have signs.

    Returns what to add to the title: " (log)", " (symlog)" or nothing.
    """
    sizes = [np.abs(list(points.values())) for points in series]
    sizes = [values[values > 0] for values in sizes if np.any(values > 0)]
    if not sizes:
        return ""
    typical = [float(np.median(values)) for values in sizes]
    everything = np.concatenate(sizes)
    low, high = np.quantile(everything, 0.02), np.quantile(everything, 0.995)
    if signed:
        if max(typical) < FAR_APART * min(typical):
            return ""
        axis.set_yscale("symlog", linthresh=max(min(typical), max(typical) * 1e-2))
        _plain_ticks(axis)
        return " (symlog)"
    positive = all(value > 0 for points in series for value in points.values())
    if positive and high > FAR_APART * low:
        axis.set_yscale("log")
        _plain_ticks(axis)
        return " (log)"
    return ""


def _plain_ticks(axis: Axes) -> None:
    """Write tick labels as plain text: matplotlib writes powers as mathematics, which STYLE turns off."""
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def zero_line(axis: Axes) -> None:
    """Draw a level line at 0, and let the axis reach at least ROUNDING to both sides of it."""
    axis.axhline(0.0, color=GREY, linewidth=1.1, zorder=1.5)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, -ROUNDING), max(high, ROUNDING))
