"""SIGKILL to a random rank at random moments, in five layouts: every run ends bit-equal, and nothing is left behind."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.kill_storm.run import LAYOUTS

KILLS = 6  # in each layout
IN_CI = ("one_process", "tp2", "pp2")  # the others lose the same files, in two minutes more


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.long) for name in LAYOUTS]
)
def test_a_run_that_is_killed_at_any_moment_ends_as_the_unbroken_one(tmp_path, record_property, layout):
    out = tmp_path / "verdicts.json"
    command = [sys.executable, "-m", "tests.kill_storm.run", "--kills", str(KILLS), "--layouts", layout]
    done = subprocess.run(
        [*command, "--json", str(out)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (verdict,) = json.loads(out.read_text())
    assert verdict["kills"] == KILLS
    assert verdict["finished"] >= 1
    assert not verdict["differences"]
    assert not verdict["survivors"]
    assert not verdict["orphans"]
    assert verdict["lost_steps"] == verdict["goodput_lost_steps"]
    record_property("slowest_end_seconds", verdict["slowest_end_seconds"])
