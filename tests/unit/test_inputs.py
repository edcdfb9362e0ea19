"""A run goes on with what it began with: content counts, and not how a path is spelt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt
from megatron_powerflow.training.inputs import Inputs, changes, model_digests, prompt_digest, read_inputs, sampled

NOW = {"tokenizers": "1", "transformers": "5"}


def inputs(digests: dict, replay: dict | None = None, versions: dict = NOW, path: str = "a") -> Inputs:
    return Inputs("2026-11-26", digests, dict.fromkeys(digests, path), replay or {}, versions)


def test_it_is_written_and_read_back(tmp_path):
    began = inputs({"prompts": "1", "weights": "2"}, {"step_000000.jsonl": "3"})
    began.write(tmp_path)
    assert read_inputs(tmp_path) == began
    assert read_inputs(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "today": 3}', "[" * 9000])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(UserError, match=r"inputs\.json"):
        read_inputs(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("prompts", "prompts.path=a: these are not the prompts"),
        ("weights", "model.hf_path=a: these are not the weights"),
        ("tokenizer", "model.hf_path=a: this is not the tokenizer"),
        ("evaluation", "evaluation.prompts=a: these are not the prompts"),
    ],
)
def test_other_content_under_the_same_path_is_named(name, words):
    (violation,) = changes(inputs({name: "1"}), inputs({name: "2"}))
    assert violation.startswith(words)
    assert changes(inputs({name: "1"}), inputs({name: "1"}, path="moved")) == []


def test_other_evaluation_prompts_may_be_chosen_on_the_way():
    assert changes(inputs({"evaluation": "1"}), inputs({"evaluation": "2"}, path="b")) == []


def test_a_newer_library_that_reads_prompts_otherwise_is_named():
    (violation,) = changes(inputs({"prompts": "1"}), inputs({"prompts": "2"}, versions=NOW | {"tokenizers": "9"}))
    assert "tokenizers 1 then, 9 now" in violation


def test_a_replayed_file_that_changed_is_named():
    (violation,) = changes(inputs({}, {"step_000003.jsonl": "1"}), inputs({}, {"step_000003.jsonl": "2"}))
    assert "step_000003.jsonl" in violation


def test_prompts_are_what_the_model_sees_of_them():
    prompts = [Prompt("a", 0, (5, 6), "4", "sums", "as it was written")]
    assert prompt_digest(prompts) == prompt_digest([Prompt("a", 0, (5, 6), "4", "sums", "otherwise")])
    for other in (Prompt("b", 0, (5, 6), "4", "sums"), Prompt("a", 0, (5, 7), "4", "sums"), Prompt("a", 0, (5, 6))):
        assert prompt_digest(prompts) != prompt_digest([other])


def test_weights_are_told_apart_wherever_they_lie(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "one"))
    moved = Path(shutil.copytree(model, tmp_path / "other"))
    digests = model_digests(model, model)
    assert set(digests) == {"weights", "tokenizer"}
    assert model_digests(moved, moved) == digests
    (weights,) = moved.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert model_digests(moved, moved)["weights"] != digests["weights"]
    settings = json.loads((moved / "tokenizer_config.json").read_text())
    (moved / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    assert model_digests(moved, moved)["tokenizer"] != digests["tokenizer"]


@pytest.mark.parametrize("place", [0, 100_000, 199_999])
def test_a_sampled_digest_looks_at_start_middle_and_end(tmp_path, place):
    path = tmp_path / "file"
    path.write_bytes(bytes(200_000))
    before = sampled(path)
    content = bytearray(200_000)
    for near in range(max(place - 8192, 0), min(place + 8192, 200_000)):
        content[near] = 1  # other weights differ in nearly every block
    path.write_bytes(bytes(content))
    assert sampled(path) != before
