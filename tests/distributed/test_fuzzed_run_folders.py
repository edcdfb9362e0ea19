"""Run folders as they come back from a crashed disk or a stranger: whatever is in them, no traceback, and nothing runs.

60 cases with the other tests, 10,000 with -m long.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.distributed.megatron_sessions import run_training
from tests.run_folder_fuzz import WEIGHTS, fuzz, nothing_to_read_everywhere, planted_everywhere

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40}


@pytest.fixture(scope="module")
def world(gloo, tiny_model, tmp_path_factory) -> tuple[Path, Path, Path]:
    """(config, folder of a run with two checkpoints and everything that a run leaves, a place to work in)."""
    folder = tmp_path_factory.mktemp("fuzz")
    prompts = "".join(json.dumps({"prompt_token_ids": [5 + i, 6], "answer": "1"}) + "\n" for i in range(4))
    (folder / "prompts.jsonl").write_text(prompts)
    config = folder / "config.yaml"
    config.write_text(
        f"""
model: {{hf_path: {tiny_model("llama", num_key_value_heads=1, head_dim=8, rope=None, **SIZES)}}}
precision: {{dtype: fp32}}
prompts: {{path: {folder / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 4, max_response_tokens: 4, save: true}}
objective: {{log_z: mlp}}
checkpoint: {{interval: 1}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 1, prompts: {folder / "prompts.jsonl"}, num_responses: 2}}
run: {{num_steps: 2, output_dir: {folder / "run"}}}
"""
    )
    gloo.run(1, run_training, config)
    return config, folder / "run", folder


@pytest.mark.slow
def test_the_folder_that_is_not_damaged_is_read_by_every_command(gloo, world):
    """Otherwise nothing below would be tried."""
    config, run, folder = world
    (answer,) = gloo.run(1, works, config, run, folder)
    assert answer == dict.fromkeys(WEIGHTS, "works")


def works(config: Path, run: Path, folder: Path) -> dict[str, str]:
    import shutil

    from tests.run_folder_fuzz import commands, tried

    copy, out = shutil.copytree(run, folder / "copy"), folder / "copy_out"
    out.mkdir()
    return {name: tried(command) for name, command in commands(config, copy, out).items()}


@pytest.mark.slow
def test_a_damaged_folder_ends_in_the_programs_own_words(gloo, world):
    (result,) = gloo.run(1, fuzz, *world, range(60))
    assert not result["bad"], "\n".join(result["bad"][:3])
    assert {name.split(":")[0] for name in result["counts"]} >= {"check", "resume", "export", "stop"}


@pytest.mark.slow
def test_a_planted_pickle_runs_in_no_file_of_a_run(gloo, world):
    (result,) = gloo.run(1, planted_everywhere, *world, ("resume",))
    assert not result["bad"], "\n".join(result["bad"][:3])
    assert result["counts"]["resume: refused"] > 12


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hf", "converted"])
def test_a_planted_pickle_runs_in_no_file_of_a_model(gloo, world, tiny_model, tmp_path, kind):
    """A Hugging Face folder, with weights of the kind that is a pickle beside its own; and a converted checkpoint."""
    from megatron_powerflow.converter.convert import ConversionRequest, hf_to_megatron
    from megatron_powerflow.converter.ranks import Ranks

    model = shutil.copytree(tiny_model("llama", num_key_value_heads=1, head_dim=8, rope=None, **SIZES), tmp_path / "hf")
    if kind == "converted":
        hf_to_megatron(ConversionRequest(model, tmp_path / "converted"), Ranks())
        model = tmp_path / "converted"
    else:  # weights of the kind that is a pickle, which are never opened
        (model / "pytorch_model.bin").write_bytes(b"x")
    (result,) = gloo.run(1, planted_everywhere, world[0], model, tmp_path, ("open",))
    assert not result["bad"], "\n".join(result["bad"][:3])
    assert result["counts"]["open: refused"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "commands"),
    [
        ("pipe", ("open", "check", "resume", "stop")),
        pytest.param("gone", ("open", "resume"), marks=pytest.mark.long),
    ],
)
def test_a_pipe_or_nothing_in_the_place_of_any_file_of_a_run_makes_nobody_wait(gloo, world, kind, commands):
    (result,) = gloo.run(1, nothing_to_read_everywhere, *world, commands, kind)
    assert not result["bad"], "\n".join(result["bad"][:3])
    assert result["counts"]["resume: refused"] >= 3


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(20))
def test_ten_thousand_damaged_folders(gloo, world, part):
    (result,) = gloo.run(1, fuzz, *world, range(500 * part, 500 * (part + 1)))
    assert not result["bad"], "\n".join(result["bad"][:3])
