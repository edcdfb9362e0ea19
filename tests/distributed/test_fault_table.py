"""Whatever file of a run is damaged, or prompts that go away while it trains: it is said, and nothing else is lost.

Some files with every push; each of them with -m long, or as a table by `python -m tests.fault_table`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.distributed.megatron_sessions import run_training
from tests.distributed.test_resume import comparable
from tests.fault_table import DAMAGES, faults_of, start, try_all, write_config

SOME = ("config.yaml", "metrics.jsonl", "inputs.json", "checkpoints/step_000002/progress.json")


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    return write_config(tmp_path, tiny_model("llama"))


@pytest.mark.slow
@pytest.mark.parametrize("names", [SOME, pytest.param(None, marks=[pytest.mark.long, pytest.mark.timeout(0)])])
def test_a_damaged_file_of_a_run_costs_itself_at_most(gloo, config, names):
    (rows,) = gloo.run(1, try_all, config, names)
    assert not (bad := faults_of(rows)), "\n".join(bad)
    assert len(rows) == len(DAMAGES) * len(names) if names else len(rows) > 100
    by_name = {(row.file, row.damage): row for row in rows}
    for damage in DAMAGES:
        assert by_name["config.yaml", damage].exit_code == 2
        if damage != "flipped":  # one bit of a number is another number
            assert "metrics.jsonl" in by_name["metrics.jsonl", damage].said
        assert "step_000002" in by_name["checkpoints/step_000002/progress.json", damage].said
    assert "has no line of 2 of the 2 steps" in by_name["metrics.jsonl", "gone"].said


@pytest.mark.slow
def test_prompts_that_go_while_a_run_trains_end_no_step_and_refuse_the_next_start(gloo, config, tmp_path):
    """A run reads its prompts once; a start that cannot read them says so, and goes on when they are back."""
    prompts, run = tmp_path / "prompts.jsonl", tmp_path / "run"
    text = prompts.read_bytes()
    gloo.run(1, run_training, config, f"run.output_dir={tmp_path / 'unbroken'}", "run.num_steps=30")
    command = [sys.executable, "-m", "megatron_powerflow.cli", "train", str(config)]
    with subprocess.Popen([*command, "run.num_steps=20"], cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        while not (run / "metrics.jsonl").is_file():
            assert process.poll() is None
            time.sleep(0.01)
        prompts.unlink()
        assert process.wait(timeout=300) == 0
    assert len(comparable(run)) == 20
    for damage in ("gone", "cut", "zeroed", "a folder"):
        if damage == "a folder":
            prompts.mkdir()
        elif (left := DAMAGES[damage](text)) is not None:
            prompts.write_bytes(left)
        ((code, said),) = gloo.run(1, start, config, "run.num_steps=30")
        assert code == 2, damage
        assert str(prompts) in said, damage
        prompts.rmdir() if prompts.is_dir() else prompts.unlink(missing_ok=True)
    prompts.write_bytes(text)
    assert gloo.run(1, start, config, "run.num_steps=30") == [(0, "")]
    assert comparable(run) == comparable(tmp_path / "unbroken")
    evaluated = [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert sorted(evaluated) == list(range(31))
