"""What did a run look like? Its curves as one PNG, from metrics.jsonl alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.names import METRICS, heading
from megatron_powerflow.metrics.writers import read_metrics
from megatron_powerflow.report.plot_style import STYLE, LineStyle, line_styles
from megatron_powerflow.report.reading import number
from megatron_powerflow.targets import file_refusals, require
from megatron_powerflow.whole_files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_NAME = "curves.png"  # in a run's folder
LEGEND_LINE = 0.1  # of a panel's height
TITLE = "powerflow curves"  # in the picture, so that it is known again
COLUMNS = 3

Lines = list[dict[str, float]]  # of metrics.jsonl


@dataclass(frozen=True, slots=True)
class CurvePanel:
    """A panel draws several metrics as lines. band: the metrics of a shaded band's lower and upper edge; title:
    needed where there are several lines."""

    lines: tuple[str, ...]
    title: str = ""
    band: tuple[str, str] | None = None

    @property
    def heading(self) -> str:
        """Return the title, or the heading of the only metric."""
        return self.title or heading(self.lines[0])


PANELS = (
    CurvePanel(("accuracy",)),
    CurvePanel(("kl_per_response",)),
    CurvePanel(("truncated_fraction", "boxed_rate"), "Truncated and boxed responses"),
    CurvePanel(("loss",)),
    CurvePanel(("residual_p05", "residual_p25", "residual_p50", "residual_p75", "residual_p95"), "Residual"),
    CurvePanel(("log_z_mean", "group_log_z_mean")),
    CurvePanel(
        ("alpha_realised", "alpha"),
        "Alpha, asked and realised; shaded: 95 % interval",
        band=("alpha_realised_low", "alpha_realised_high"),
    ),
    CurvePanel(("response_length_mean", "response_length_p95"), "Response length (tokens)"),
    CurvePanel(("policy_entropy",)),
    CurvePanel(("grad_norm",)),
    CurvePanel(("tokens_per_second", "rollout_tokens_per_second"), "Response tokens per second"),
    CurvePanel(("sampler_gap_mean", "sampler_gap_max"), "Sampler against scorer (nats per token)"),
    CurvePanel(("sync_gap_mean", "sync_gap_max"), "Servers' weights against the trainer's (nats per token)"),
    CurvePanel(("lag_mean", "lag_max"), "Lag of the sampler's weights (steps)"),
)


def draw_curves(runs: Sequence[Path], out: Path, notes: list[str] | None = None) -> Path:
    """Draw the curves of one or more run folders over each other into `out` (PNG). Returns `out`.

    notes: gets what is damaged in the folders.
    Raises UserError when a folder holds no metrics, matplotlib is not installed or `out` may not be or cannot be
    written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("curves need matplotlib; pip install matplotlib") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if out != runs[0] / CURVES_NAME:
        require(_refusals(out))
    lines = {run: read_metrics(run, notes) for run in runs}
    empty = [f"{run}: no metrics.jsonl with a step in it; is this a run's folder?" for run in runs if not lines[run]]
    if empty:
        raise UserError(empty)
    known = {name for of_run in lines.values() for line in of_run for name in line}
    shown = [panel for panel in PANELS if known & set(panel.lines)]
    if not shown:
        raise UserError(f"{runs[0]}: metrics.jsonl has none of the numbers that curves show; is this a run's folder?")
    with matplotlib.rc_context(STYLE):
        rows = ceil(len(shown) / COLUMNS)
        figure = Figure(figsize=(17, 4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, COLUMNS)
        for index, panel in enumerate(shown):
            _draw(figure.add_subplot(grid[index // COLUMNS, index % COLUMNS]), panel, lines)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, metadata={"Title": TITLE})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, picture.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); write elsewhere") from None
    return out


def _draw(axis: Axes, panel: CurvePanel, lines: dict[Path, Lines]) -> None:
    from megatron_powerflow.metrics.axes import end_at_share, make_room_above, step_axis

    styles = iter(line_styles(len(lines) * len(panel.lines)))
    bands = []
    for run, of_run in lines.items():
        for name in panel.lines:
            style = next(styles)
            steps, values = _series(of_run, name)
            if steps:
                drawn = style.line()
                if len(steps) == 1:  # one style of line has no marker, and a run of one step would show nothing
                    drawn["marker"] = style.marker
                axis.plot(steps, values, label=_label(panel, run, name, len(lines)), **drawn)
            if name == panel.lines[0] and panel.band:
                bands.append((style, of_run, panel.band))
    limits = axis.get_ylim()
    for style, of_run, (low, high) in bands:
        _shade(axis, style, of_run, low, high)
    if panel.band:
        axis.set_ylim(limits)  # an interval may be wide where little is known: the lines say how high the panel is
    shares = all(METRICS[name].share for name in panel.lines)
    if shares:
        end_at_share(axis)
    axis.set_title(panel.heading)
    step_axis(axis)
    if len(axis.lines) > 1:
        if not shares:
            make_room_above(axis, LEGEND_LINE * len(axis.lines))
        axis.legend(loc="best" if shares else "upper left", fontsize=9, frameon=True, framealpha=0.8, edgecolor="none")


def _label(panel: CurvePanel, run: Path, name: str, num_runs: int) -> str:
    """Return what tells a line from the others of its panel."""
    parts = ([run.name] if num_runs > 1 else []) + ([METRICS[name].name] if len(panel.lines) > 1 else [])
    text = ": ".join(parts)
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves names with an underscore out


def _shade(axis: Axes, style: LineStyle, of_run: Lines, low: str, high: str) -> None:
    both = [line for line in of_run if all(number(line.get(name)) is not None for name in (low, high))]
    steps, lower, upper = ([line[name] for line in both] for name in ("step", low, high))
    axis.fill_between(steps, lower, upper, color=style.color, alpha=0.2, linewidth=0)


def _series(of_run: Lines, name: str) -> tuple[list[float], list[float]]:
    """Return the steps and the finite values of a metric."""
    points = [(line["step"], line[name]) for line in of_run if number(line.get(name)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _refusals(out: Path) -> list[str]:
    if out.suffix != ".png":
        return [f"--out {out}: curves are drawn as PNG; name a file that ends in .png"]
    if not out.parent.exists():
        return []
    return file_refusals(out, lambda start: start.startswith(b"\x89PNG") and f"Title\0{TITLE}".encode() in start)
