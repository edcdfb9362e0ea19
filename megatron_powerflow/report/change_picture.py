"""What did training do to the policy, as a picture? A line per held-out prompt from before to after, and their mean."""

from __future__ import annotations

import io
from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.change import Changes
from megatron_powerflow.metrics.counts import mean, standard_error
from megatron_powerflow.metrics.names import heading
from megatron_powerflow.report.plot_style import STYLE
from megatron_powerflow.whole_files import write_file

CHANGE_NAME = "before_after.png"  # in a run's folder


def draw_change(changes: Changes, alpha: float | None, out: Path) -> Path:
    """Draw each held-out prompt before and after training into `out` (PNG) and return `out`.

    Raises UserError where matplotlib is missing or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; pip install matplotlib") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = (f"step {changes.first['step']}", f"step {changes.last['step']}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4 * len(changes.quantities), 4), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, change in zip(figure.subplots(1, len(changes.quantities)), changes.quantities, strict=True):
            for pair in zip(change.before, change.after, strict=True):
                axis.plot((0, 1), pair, color="0.75", linewidth=0.8)
            sides = (change.before, change.after)
            axis.errorbar(
                (0, 1),
                [mean(side) for side in sides],
                yerr=[standard_error(side) for side in sides],
                color="C0",
                linewidth=2.5,
                marker="o",
                capsize=4,
            )
            axis.set_xticks((0, 1), steps)
            axis.set_xlim(-0.25, 1.25)
            axis.set_title(heading(change.name), fontsize=10)
            axis.set_xlabel(f"difference {change.difference:+.3f} ± {change.error:.3f}")
        asked = "" if alpha is None else f"alpha {alpha:g}: "
        figure.suptitle(f"{asked}{len(changes.quantities[0].before)} held-out prompts (grey), their mean (blue)")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
    try:
        write_file(out, picture.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    return out
