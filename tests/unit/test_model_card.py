"""The card of an export says what the run's folder says, and makes nothing up."""

from __future__ import annotations

import json

import pytest

from megatron_powerflow.config_file import dump_config, parse_config
from megatron_powerflow.model_card import card_files


@pytest.fixture
def run(tmp_path):
    base, folder = tmp_path / "Some-Base", tmp_path / "run"
    base.mkdir()
    folder.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Some base\n")
    values = {
        "model": {"hf_path": str(base)},
        "prompts": {"path": str(tmp_path / "prompts.jsonl")},
        "rollout": {"prompts_per_step": 4, "responses_per_prompt": 8},
        "objective": {"alpha": 2.0},
        "run": {"output_dir": str(folder), "num_steps": 20},
    }
    (folder / "config.yaml").write_text(dump_config(parse_config(values, [])))
    lines = [
        {"step": step, "alpha_realised": 1 + step / 20, "alpha_realised_low": 1.0, "alpha_realised_high": 2.0}
        for step in range(20)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [
        {"step": step, "accuracy": 0.25 + step / 100, "accuracy_se": 0.01, "by_prompt": {"id": ["a"]}}
        for step in (0, 10, 20)
    ]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    return folder


def test_it_says_base_method_alpha_steps_and_evaluation(run):
    files = card_files(run, 20, "powerflow train x.yaml")
    card = files["README.md"]
    for words in (
        "base_model: Some-Base",
        "license: apache-2.0",
        "sharpened (alpha 2)",
        "| alpha, asked | 2 |",
        "| alpha, realised (last 10 steps) | 1.73 [1.00, 2.00] |",  # the mean of steps 10 to 19
        "| steps; rollouts | 20; 640 |",
        "| prompts | prompts.jsonl |",
        "| | step 0 | step 20 |",
        "| accuracy | 0.25 +- 0.01 | 0.45 +- 0.01 |",
    ):
        assert words in card
    provenance = json.loads(files["provenance.json"])
    assert provenance["export"]["command"] == "powerflow train x.yaml"
    assert provenance["objective"]["alpha"] == 2.0
    assert [line["step"] for line in provenance["evaluations"]] == [0, 10, 20]
    assert "by_prompt" not in files["provenance.json"]


def test_an_earlier_step_is_described_by_what_was_known_then(run):
    card = card_files(run, 10, "powerflow export")["README.md"]
    assert "| accuracy | 0.25 +- 0.01 | 0.35 +- 0.01 |" in card
    assert "0.45" not in card
    assert "| alpha, realised (last 10 steps) | 1.23" in card


def test_no_licence_is_made_up(run, tmp_path):
    (tmp_path / "Some-Base" / "README.md").unlink()
    card = card_files(run, 20, "powerflow export")["README.md"]
    assert "license:" not in card
    assert "which its folder does not state" in card


def test_a_damaged_line_of_the_run_is_left_out_and_named(run):
    whole = card_files(run, 20, "powerflow export")
    assert "damaged" not in json.loads(whole["provenance.json"])
    path = run / "evaluations.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:9], lines[2], '{"step": 3, "accuracy": NaN}']) + "\n")
    files = card_files(run, 20, "powerflow export")
    assert files["README.md"] == whole["README.md"]
    found = json.loads(files["provenance.json"])
    assert [line["step"] for line in found["evaluations"]] == [0, 20]
    assert [note.removeprefix(str(path)).split(":")[1] for note in found["damaged"]] == ["2", "4"]
