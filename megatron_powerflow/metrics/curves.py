"""What did a run look like? Its curves as one PNG, from metrics.jsonl alone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from math import ceil
from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.plot_style import STYLE, line_styles
from megatron_powerflow.metrics.writers import read_metrics
from megatron_powerflow.targets import file_refusals, require, write_file

CURVES_NAME = "curves.png"  # in a run's folder
TITLE = "powerflow curves"  # in the picture, so that it is known again
# panel title -> the metrics it shows
PANELS = {
    "loss": ("loss",),
    "residual": ("residual_p05", "residual_p25", "residual_p50", "residual_p75", "residual_p95"),
    "log Z' (per token)": ("log_z_mean", "group_log_z_mean"),
    "alpha, asked and realised": ("alpha_realised", "alpha", "alpha_realised_low", "alpha_realised_high"),
    "response length (tokens)": ("response_length_mean", "response_length_p95"),
    "policy entropy (nats per token)": ("policy_entropy",),
    "gradient norm": ("grad_norm",),
    "fractions": ("truncated_fraction", "boxed_rate"),
    "tokens per second": ("tokens_per_second", "rollout_tokens_per_second"),
    "sampler against scorer (nats per token)": ("sampler_gap_mean", "sampler_gap_max"),
}
COLUMNS = 3


def _refusals(out: Path) -> list[str]:
    if out.suffix != ".png":
        return [f"--out {out}: curves are drawn as PNG; name a file that ends in .png"]
    if not out.parent.exists():
        return []
    return file_refusals(out, lambda start: start.startswith(b"\x89PNG") and f"Title\0{TITLE}".encode() in start)


def draw_curves(runs: Sequence[Path], out: Path) -> Path:
    """Draw the curves of one or more run folders over each other into `out` (PNG). Returns `out`.

    Raises UserError when a folder holds no metrics, or matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("curves need matplotlib; pip install matplotlib") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if out != runs[0] / CURVES_NAME:
        require(_refusals(out))
    lines = {run: read_metrics(run) for run in runs}
    empty = [f"{run}: no metrics.jsonl with a step in it; is this a run's folder?" for run in runs if not lines[run]]
    if empty:
        raise UserError(empty)
    with matplotlib.rc_context(STYLE):
        rows = ceil(len(PANELS) / COLUMNS)
        figure = Figure(figsize=(17, 4 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, COLUMNS).flat
        for axis in axes[len(PANELS) :]:
            axis.remove()
        for axis, (title, names) in zip(axes[: len(PANELS)], PANELS.items(), strict=True):
            styles = iter(line_styles(len(runs) * len(names)))
            for run in runs:
                for name in names:
                    style = next(styles)
                    points = [(line["step"], line[name]) for line in lines[run] if name in line]
                    if points:
                        label = name if len(runs) == 1 else f"{run.name}: {name}"
                        axis.plot(*zip(*points, strict=True), label=label, **style.line())
            axis.set_title(title)
            axis.set_xlabel("step")
            if axis.lines:
                axis.legend(fontsize=9, frameon=True, framealpha=0.8, edgecolor="none")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110, metadata={"Title": TITLE})
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, picture.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); write elsewhere") from None
    return out
