"""Before and after: paired over prompts; refused where the prompts are not the same."""

from __future__ import annotations

import numpy as np
import pytest
from rich.console import Console

from megatron_powerflow.metrics.change import QUANTITIES, change_table, changes_of
from megatron_powerflow.report.change_picture import draw_change


def line(step: int, shift: float = 0.0, num_prompts: int = 6, **changes) -> dict:
    values = np.random.default_rng(0).normal(size=num_prompts)
    noise = np.random.default_rng(step).normal(size=num_prompts) * 0.01
    by_prompt = {name: list(values + shift + noise) for name in QUANTITIES} | {
        "id": [str(n) for n in range(num_prompts)]
    }
    return {"step": step, "num_prompts": num_prompts, "num_responses": 4, "by_prompt": by_prompt} | changes


def test_the_error_is_that_of_the_differences_over_prompts():
    first, last = line(0), line(8, shift=0.5)
    found = changes_of([first, line(4, shift=9.0), last])
    for change in found.quantities:
        differences = np.subtract(last["by_prompt"][change.name], first["by_prompt"][change.name])
        assert change.difference == pytest.approx(differences.mean())
        assert change.error == pytest.approx(differences.std(ddof=1) / 6**0.5)
        assert change.error < 0.02 < np.std(change.before)  # what prompts have in common is no noise


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [line(0)],
        [line(0), line(8, num_prompts=5)],
        [line(0, num_prompts=1), line(8, num_prompts=1)],
        [line(0, by_prompt=None), line(8)],
        [line(0), line(8, by_prompt=line(8)["by_prompt"] | {"id": list("abcdef")})],
    ],
    ids=["nothing", "one look", "other number", "one prompt", "older version", "other prompts"],
)
def test_what_cannot_be_compared_is_not(lines):
    assert changes_of(lines) is None


def test_table_and_picture_say_what_changed(tmp_path):
    first = line(0, alpha_realised=1.0, alpha_realised_low=1.0, alpha_realised_high=1.0)
    last = line(8, shift=0.5, alpha_realised=1.31, alpha_realised_low=1.2, alpha_realised_high=1.42)
    changes = changes_of([first, last])
    console = Console(width=80, record=True)
    console.print(change_table(changes, 2.0))
    text = console.export_text()
    assert "…" not in text
    for words in (
        "means of 6 held-out prompts x 4",
        "alpha 2",
        "step 0",
        "step 8",
        "+0.487",
        "1.31 [1.20, 1.42]",
    ):
        assert words in text
    out = draw_change(changes, 2.0, tmp_path / "before_after.png")
    assert out.read_bytes().startswith(b"\x89PNG")
