"""What does an axis of steps or of shares look like? The same in every picture.

Left out: colours and sizes (`report/plot_style.py`); what is drawn.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator


def step_axis(axis: Axes) -> None:
    """Labels the x axis as one of steps, with ticks at whole numbers."""
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))


def end_at_share(axis: Axes, *, x: bool = False) -> None:
    """Ends the y axis (x: the x axis), which shows shares, at 0 and 1. To be called when everything is drawn."""
    low, high = axis.get_xlim() if x else axis.get_ylim()
    (axis.set_xlim if x else axis.set_ylim)(max(low, 0.0), min(high, 1.0))
    for line in axis.lines:
        line.set_clip_on(False)  # a marker at 0 or 1 is drawn whole


def make_room_above(axis: Axes, share: float) -> None:
    """Makes the y axis longer by a share of its height, so that a legend above the lines hides none of them."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + (high - low) * share)
