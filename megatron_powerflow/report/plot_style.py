"""How does a picture tell its lines apart, in colour, in grey and for the colour-blind?

Three ways at once: lightness falls evenly from the last line to the first, so that a grey print keeps the order; hues
alternate between the blue and the yellow side, the axis that the common colour-blindnesses keep; dashes and markers
repeat only after 35 lines.

Left out: what is drawn. No pyplot: neither this module nor the pictures keep state between two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, radians, sin
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from matplotlib.typing import LineStyleType, MarkerType, RcKeyType

DASHES = ((), (6, 2), (1.2, 1.6), (7, 2, 1.2, 2), (3, 1.4, 3, 1.4, 1.2, 1.4))  # in line widths; (): solid
MARKERS: tuple[MarkerType, ...] = ("o", "s", "^", "D", "v", "P", "X")
HUES = (260.0, 60.0, 310.0, 110.0, 210.0, 20.0)  # OKLCH degrees: blue, orange, violet, olive, teal, red
CHROMA = 0.16
DARKEST, LIGHTEST = 22.0, 70.0  # CIE L*: the lightest still stands out on white

# For matplotlib.rc_context. Pictures are 11 inches wide and shown at 1056 CSS pixels or less; at 760, the narrowest
# the page is meant for, 12.8 points are still 9.
STYLE: dict[RcKeyType, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 12.8,
    "axes.titlesize": 13.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 12.8,
    "axes.labelpad": 6.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "xtick.labelsize": 12.8,
    "ytick.labelsize": 12.8,
    "legend.fontsize": 12.8,
    "legend.frameon": False,
    "legend.handlelength": 3.4,
    "lines.linewidth": 1.9,
    "lines.markersize": 6.0,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "text.parse_math": False,  # a label from a config file is text, whatever it contains
}


class MarkKeywords(TypedDict, total=False):
    """The keywords of `Axes.plot` and `Line2D` that say how a marker looks."""

    marker: MarkerType
    markersize: float
    markerfacecolor: str
    markeredgecolor: str
    markeredgewidth: float
    linestyle: LineStyleType


class LineKeywords(MarkKeywords, total=False):
    """The keywords of `Axes.plot` and `Line2D` that say how a line and its markers look."""

    color: str
    linewidth: float


@dataclass(frozen=True, slots=True)
class LineStyle:
    """A style says how one line looks. Example: color "#1f4e9c", dashes (6, 2), marker "s"."""

    color: str
    dashes: tuple[float, ...]
    marker: MarkerType
    edge: str = "white"  # of the marker; black: evaluated only
    width: float = 1.9

    def line(self) -> LineKeywords:
        """Return the keywords for `axis.plot` of the line without markers."""
        linestyle: LineStyleType = (0, self.dashes) if self.dashes else "-"
        return {"color": self.color, "linestyle": linestyle, "linewidth": self.width}

    def marked(self) -> LineKeywords:
        """Return the keywords for `axis.plot` of the line with its markers."""
        return {**self.line(), "marker": self.marker, "markeredgecolor": self.edge, "markeredgewidth": 0.7}

    def point(self) -> LineKeywords:
        """Return the keywords of a marker that stands alone."""
        return {**self.marked(), "linestyle": "none", "markeredgecolor": "black", "markersize": 11.0}


def line_styles(count: int) -> list[LineStyle]:
    """Return the styles of `count` lines, darkest first."""
    step = (LIGHTEST - DARKEST) / (count - 1) if count > 1 else 0.0
    return [
        LineStyle(
            color=_colour(HUES[index % len(HUES)], _luminance_of_lightness(DARKEST + index * step)),
            dashes=DASHES[index % len(DASHES)],
            marker=MARKERS[index % len(MARKERS)],
        )
        for index in range(count)
    ]


def relative_luminance(color: str) -> float:
    """Return the luminance of "#rrggbb", from 0 (black) to 1 (white) as WCAG 2 defines it: what a grey print keeps."""
    red, green, blue = (_linear(int(color[start : start + 2], 16) / 255) for start in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _colour(hue: float, luminance: float) -> str:
    """Return the sRGB colour of a hue with the wanted luminance, as colourful as CHROMA and sRGB allow."""
    chroma = CHROMA
    while True:
        low, high = 0.0, 1.0
        for _ in range(40):  # luminance rises with OKLab lightness: bisection
            middle = (low + high) / 2
            red, green, blue = _oklch_to_linear(middle, chroma, hue)
            reached = 0.2126 * red + 0.7152 * green + 0.0722 * blue
            low, high = (middle, high) if reached < luminance else (low, middle)
        channels = _oklch_to_linear(low, chroma, hue)
        if all(-1e-4 <= channel <= 1.0001 for channel in channels) or chroma < 1e-3:
            return "#" + "".join(f"{round(255 * _gamma(min(max(c, 0.0), 1.0))):02x}" for c in channels)
        chroma *= 0.95


def _oklch_to_linear(lightness: float, chroma: float, hue: float) -> tuple[float, float, float]:
    """Convert OKLCH to linear sRGB (Ottosson 2020)."""
    a, b = chroma * cos(radians(hue)), chroma * sin(radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _luminance_of_lightness(lightness: float) -> float:
    """Convert CIE L* above 8 to relative luminance."""
    return ((lightness + 16) / 116) ** 3


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def _gamma(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
