"""Lines can be told apart: in a grey print, and by the colour-blind."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest

from megatron_powerflow.report.plot_style import line_styles, relative_luminance

# Dichromats' view of linear sRGB, severity 1 (Machado, Oliveira and Fernandes 2009).
SEEN_BY = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lightness(color: str) -> float:
    return 116 * relative_luminance(color) ** (1 / 3) - 16


def linear(color: str) -> np.ndarray:
    channels = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear sRGB -> CIE L*a*b*, D65."""
    matrix = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = np.clip(np.array(matrix) @ rgb, 0, None) / np.array([0.95047, 1.0, 1.08883])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("count", range(2, 15))
def test_neighbouring_lines_differ_in_a_grey_print(count):
    steps = [lightness(b.color) - lightness(a.color) for a, b in pairwise(line_styles(count))]
    assert min(steps) > 0.9 * 48 / (count - 1)  # even, and always lighter


@pytest.mark.parametrize("count", range(1, 15))
def test_every_line_stands_out_on_white(count):
    for style in line_styles(count):
        assert 1.05 / (relative_luminance(style.color) + 0.05) > 2.2, style


def test_dashes_and_marker_together_name_a_line():
    styles = line_styles(35)
    assert len({(style.dashes, style.marker) for style in styles}) == 35


@pytest.mark.parametrize("view", SEEN_BY)
@pytest.mark.parametrize("count", range(2, 15))
def test_the_colour_blind_see_neighbours_in_different_colours(count, view):
    """Any two lines differ at least by lightness; neighbours by clearly more than a just noticeable 2.3."""
    seen = [lab(np.array(SEEN_BY[view]) @ linear(style.color)) for style in line_styles(count)]
    assert min(np.linalg.norm(one - other) for one, other in pairwise(seen)) > 10
    assert min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 4
