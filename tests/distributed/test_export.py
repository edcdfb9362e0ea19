"""The export: a plain Hugging Face folder, the same from every layout, with nothing of ours in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.megatron_sessions import run_training
from tests.tiny_models import FAMILIES, MIXTURES, OTHER_SHAPES


def export_untrained(model: str, out: str, max_shard_bytes: int = 10**9, **parallel) -> None:
    from megatron_powerflow.config import ModelSection, ParallelSection, PrecisionSection
    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES as families
    from megatron_powerflow.hf.live_weights import export_to_hf
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import inference_layout
    from megatron_powerflow.training.policy import build_policy

    launch = read_launch()
    architecture, family = read_architecture(model, families)
    layout = inference_layout(ParallelSection(**parallel), architecture, launch.world_size)
    with initialized(layout, launch, seed=0) as groups:
        precision = PrecisionSection(dtype="fp32")
        chunks = build_policy(architecture, family, layout, ModelSection(hf_path=model), precision, groups)
        export_to_hf(
            chunks,
            architecture,
            family,
            groups,
            companions=Path(model),
            out=Path(out),
            source=Path(model),
            max_shard_bytes=max_shard_bytes,
        )


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "pp", "max_shard_bytes"), [(1, 1, 10**9), (2, 1, 10**9), (1, 2, 40_000), (2, 2, 10**9)])
def test_hf_to_megatron_to_hf_is_bit_equal(gloo, tiny_model, tmp_path, family, tp, pp, max_shard_bytes):
    model, out = tiny_model(family), tmp_path / "out"
    sequence_parallel = tp > 1 and family in MIXTURES
    parallel = {"tp": tp, "pp": pp, "sequence_parallel": sequence_parallel}
    gloo.run(tp * pp, export_untrained, str(model), str(out), max_shard_bytes, **parallel)
    assert_same_folder(model, out)
    if max_shard_bytes < 10**9:
        assert len(list(out.glob("*.safetensors"))) > 4


@pytest.mark.parametrize("family", FAMILIES)
def test_other_shapes_come_back_bit_equal_too(gloo, tiny_model, tmp_path, family):
    model, out = tiny_model(family, **OTHER_SHAPES[family]), tmp_path / "out"
    gloo.run(4, export_untrained, str(model), str(out), tp=2, pp=2, sequence_parallel=family in MIXTURES)
    assert_same_folder(model, out)


@pytest.mark.parametrize("settings", [{"ep": 2}, {"ep": 2, "tp": 2, "sequence_parallel": True}, {"ep": 2, "pp": 2}])
def test_spread_experts_come_back_bit_equal(gloo, tiny_model, tmp_path, settings):
    """Each holder of experts writes its own: none twice, none missing."""
    model, out = tiny_model("qwen3_moe"), tmp_path / "out"
    gloo.run(4, export_untrained, str(model), str(out), **settings)
    assert_same_folder(model, out)


def assert_same_folder(model: Path, out: Path) -> None:
    before, after = tensors_of(model), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (out / "config.json").read_text() == (model / "config.json").read_text().rstrip() + "\n"
    assert not out.with_name("out.partial").exists()
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}}}
prompts: {{path: {tmp_path / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
optimizer: {{lr: 1e-3}}
metrics: {{wandb: "off"}}
evaluation: {{samples: 0}}
run: {{num_steps: 1, output_dir: {tmp_path / "run"}}}
"""
    )
    return path


@pytest.mark.slow
def test_an_export_holds_no_head_and_loads_in_transformers(gloo, config, tiny_model, tmp_path):
    """Law 20. bf16 training exports bf16, and config.json says so."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gloo.run(2, run_training, config, "parallel.pp=2", "precision.dtype=bf16", "objective.log_z=mlp")
    assert list((tmp_path / "run" / "checkpoints").glob("step_*/log_z_head.safetensors"))
    export = tmp_path / "run" / "hf_export"
    names = tensors_of(export).keys()
    assert names == tensors_of(tiny_model("llama")).keys()
    assert not [name for name in names if "log_z" in name or "centre" in name]
    model = AutoModelForCausalLM.from_pretrained(export)
    assert model.dtype == torch.bfloat16
    answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] >= 4
    assert AutoTokenizer.from_pretrained(export)("w5 w6")["input_ids"] == [5, 6]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo2", "gemma2"))]
)
def test_scores_of_checkpoint_and_export_are_one(gloo, config, tiny_model, tmp_path, family):
    """powerflow score of the training checkpoint, under another layout, equals that of the exported folder."""
    gloo.run(1, run_training, config, "precision.dtype=fp32", f"model.hf_path={tiny_model(family)}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"prompt_token_ids": [5, 6], "response_token_ids": [7, 8, 2]}\n{"prompt": "w3", "response": "w4"}\n'
    )
    lines = {}
    for name, folder, num_ranks, overrides in (
        ("checkpoint_tp2", tmp_path / "run", 2, ("parallel.tp=2",)),
        ("checkpoint_dp2", tmp_path / "run" / "checkpoints" / "step_000001", 2, ()),
        ("export", tmp_path / "run" / "hf_export", 1, ()),
    ):
        out = tmp_path / f"{name}.jsonl"
        gloo.run(num_ranks, score_to, str(folder), str(rows), str(out), overrides)
        lines[name] = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines["export"]] == ["0", "1"]
    assert [len(line["log_probs"]) for line in lines["export"]] == [3, 1]
    for name in ("checkpoint_tp2", "checkpoint_dp2"):
        for ours, theirs in zip(lines[name], lines["export"], strict=True):
            assert ours["log_probs"] == pytest.approx(theirs["log_probs"], abs=1e-4)
            assert ours["sequence_log_prob"] == pytest.approx(sum(ours["log_probs"]), abs=1e-6)


def score_to(folder: str, rows: str, out: str, overrides: tuple) -> None:
    import io

    from megatron_powerflow.commands.open_model import SCORE_KEYS, open_model
    from megatron_powerflow.commands.score import score_file
    from megatron_powerflow.console import make_console
    from megatron_powerflow.parallel.launch import read_launch

    launch = read_launch()
    opened = open_model(Path(folder), overrides, SCORE_KEYS, launch.world_size)
    score_file(opened, Path(rows), Path(out), launch, make_console(io.StringIO()))


def generate_to(folder: str, prompts: str, out: str, overrides: tuple, num_responses: int, greedy: bool) -> None:
    import io

    from megatron_powerflow.commands.generate import generate_file
    from megatron_powerflow.commands.open_model import GENERATE_KEYS, open_model
    from megatron_powerflow.console import make_console
    from megatron_powerflow.parallel.launch import read_launch

    launch = read_launch()
    opened = open_model(Path(folder), overrides, GENERATE_KEYS, launch.world_size)
    console = make_console(io.StringIO())
    generate_file(opened, Path(prompts), Path(out), num_responses, greedy, launch, console)


def test_generated_lines_are_in_order_and_equal_under_every_layout(gloo, tiny_model, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [5 + i], "id": f"p{i}"}) + "\n" for i in range(5)))
    settings = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=6", "rollout.max_concurrent_rows=64")
    answers = {}
    for name, num_ranks, extra in (("one", 1, ()), ("dp2", 2, ()), ("tp2_pp2", 4, ("parallel.tp=2", "parallel.pp=2"))):
        out = tmp_path / f"{name}.jsonl"
        arguments = (str(tiny_model("llama")), str(prompts), str(out), (*settings, *extra), 3, False)
        gloo.run(num_ranks, generate_to, *arguments)
        answers[name] = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["id"], line["response_index"]) for line in answers["one"]] == [
        (f"p{i}", r) for i in range(5) for r in range(3)
    ]
    for name in ("dp2", "tp2_pp2"):
        for ours, theirs in zip(answers[name], answers["one"], strict=True):
            assert ours["response_token_ids"] == theirs["response_token_ids"]
            assert ours["log_probs"] == pytest.approx(theirs["log_probs"], abs=1e-4)
            assert ours["finish_reason"] == theirs["finish_reason"]
    (first, *_) = answers["one"]
    assert first["text"] == " ".join(f"w{token}" for token in first["response_token_ids"] if token > 2)
    assert len(first["log_probs"]) == len(first["response_token_ids"])


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_the_claimed_log_probs_of_generated_tokens_are_the_scorers(gloo, tiny_model, tmp_path, family):
    """Gemma 2: with caps, and beyond its window of 7 tokens."""
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6]}\n')
    settings = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=6", "rollout.temperature=0.7")
    model = str(tiny_model(family))
    gloo.run(1, generate_to, model, str(prompts), str(answers), settings, 4, False)
    generated = [json.loads(line) for line in answers.read_text().splitlines()]
    rows, scored = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt_token_ids": [5, 6], "response_token_ids": line["response_token_ids"]}) + "\n"
            for line in generated
        )
    )
    gloo.run(1, score_to, model, str(rows), str(scored), ("rollout.temperature=0.7",))
    for line, score in zip(generated, scored.read_text().splitlines(), strict=True):
        assert line["log_probs"] == pytest.approx(json.loads(score)["log_probs"], abs=1e-4)
