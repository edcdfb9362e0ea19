"""A run goes on with what it began with: content counts, and not how a path is spelt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt
from megatron_powerflow.training.inputs import (
    Inputs,
    changes,
    model_digests,
    prompt_digest,
    read_inputs,
    weights_digest,
)

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
    assert violation.text.startswith(words)
    assert changes(inputs({name: "1"}), inputs({name: "1"}, path="moved")) == []


def test_other_evaluation_prompts_may_be_chosen_on_the_way():
    assert changes(inputs({"evaluation": "1"}), inputs({"evaluation": "2"}, path="b")) == []


def test_a_newer_library_that_reads_prompts_otherwise_is_named():
    (violation,) = changes(inputs({"prompts": "1"}), inputs({"prompts": "2"}, versions=NOW | {"tokenizers": "9"}))
    assert "tokenizers 1 then, 9 now" in violation.text


def test_a_replayed_file_that_changed_is_named():
    (violation,) = changes(inputs({}, {"step_000003.jsonl": "1"}), inputs({}, {"step_000003.jsonl": "2"}))
    assert "step_000003.jsonl" in violation.text


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


def test_weights_are_the_same_in_other_files_and_other_by_one_byte_anywhere(tmp_path):
    import torch
    from safetensors.torch import save_file

    tensors = {f"layer.{n}": torch.arange(40_000.0).view(200, 200) + n for n in range(3)}
    (one, two) = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    save_file({"layer.0": tensors["layer.0"]}, two / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in ("layer.2", "layer.1")}, two / "model-00002-of-00002.safetensors")
    same = weights_digest(list(one.iterdir()))
    assert weights_digest(list(two.iterdir())) == same
    content = (one / "model.safetensors").read_bytes()
    for place in (-1, -160_000 - 5, -77_777):
        changed = bytearray(content)
        changed[place] ^= 1
        (one / "model.safetensors").write_bytes(bytes(changed))
        assert weights_digest([one / "model.safetensors"]) != same


@pytest.mark.parametrize("name", ["layer.0", "norm"])
def test_of_a_large_model_every_tensor_is_looked_at(tmp_path, monkeypatch, name):
    import torch
    from safetensors.torch import save_file

    from megatron_powerflow.training import inputs as module

    monkeypatch.setattr(module, "WHOLE_BYTES", 1000)
    path, tensors = tmp_path / "model.safetensors", {"layer.0": torch.ones(300, 300), "norm": torch.ones(64)}
    save_file(tensors, path)
    before = weights_digest([path])
    save_file(tensors | {name: tensors[name] + 1e-3}, path)
    assert weights_digest([path]) != before


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x10" + bytes(7) + b"{" * 16])
def test_a_damaged_file_counts_as_it_is(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    before = weights_digest([path])
    path.write_bytes(content + b"1")
    assert weights_digest([path]) != before


def test_the_layout_of_a_tokenizers_file_says_nothing(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model("llama"), tmp_path / "one"))
    before = model_digests(model, model)
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))
    assert model_digests(model, model) == before
