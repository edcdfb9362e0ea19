"""Bad input: a clear error that names what is wrong, exit code 2, and nothing lost."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_powerflow.config import ParallelSection, PrecisionSection
from megatron_powerflow.config_file import load_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_architecture
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.model.precision import require_fp8_support
from megatron_powerflow.training.plan import make_plan
from tests.conftest import run_cli
from tests.distributed.megatron_sessions import run_training


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tmp_path / "model"}}}
precision: {{dtype: fp32}}
prompts: {{path: {tmp_path / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
objective: {{log_z: mlp}}
optimizer: {{lr: 1e-3}}
checkpoint: {{interval: 1}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 2, output_dir: {tmp_path / "run"}}}
"""
    )
    return path


def violations(config: Path, *overrides: str, world_size: int = 1) -> str:
    with pytest.raises(UserError) as caught:
        make_plan(load_config(config, overrides), world_size)
    return "\n".join(caught.value.violations)


def test_everything_that_is_wrong_is_said_at_once(config, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w5"}\nnonsense\n')
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    text = violations(config, "parallel.tp=3", "rollout.max_response_tokens=1000", world_size=4)
    assert "4 processes do not hold tp=3" in text
    assert "parallel.tp=3 does not divide num_attention_heads=4; choose 1, 2 or 4" in text
    assert "over the model's max_position_embeddings=256" in text
    assert "prompts.jsonl:2: not a line of JSON" in text


def test_a_model_folder_without_config_tokenizer_or_weights(config, tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / "model" / name).rename(tmp_path / name)
        assert name.split(".")[0] in violations(config)
        (tmp_path / name).rename(tmp_path / "model" / name)
    assert "no such folder" in violations(config, "model.hf_path=/nowhere")


def test_an_unsupported_family_lists_the_supported_ones(config, tmp_path):
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))
    assert "model_type='gpt2' is not supported; supported: llama, mistral, qwen2, qwen3" in violations(config)


def test_truncated_weights_are_found_before_anything_starts(config, tmp_path):
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors: truncated or damaged" in violations(config)


def test_prompts_over_the_limit_are_counted_or_refused(config):
    plan = make_plan(load_config(config, ["rollout.max_prompt_tokens=2"]), 1)
    assert (len(plan.prompts), plan.num_prompts_too_long) == (1, 1)
    text = violations(config, "rollout.max_prompt_tokens=2", "prompts.too_long=error")
    assert "prompts.jsonl:1: 3 tokens, over rollout.max_prompt_tokens=2" in text


def test_fp8_is_refused_for_layers_that_transformer_engine_does_not_know(tiny_model):
    precision = PrecisionSection(dtype="fp8", fp8_recipe="tensorwise")

    def refusals(family: str, cp: int = 1, **changes) -> str:
        architecture, _ = read_architecture(tiny_model(family, **changes), FAMILIES)
        try:
            require_fp8_support(precision, architecture, ParallelSection(cp=cp))
        except UserError as error:
            return str(error)
        return ""

    assert "a gemma2 model does not run on Transformer Engine" in refusals("gemma2")
    assert "a olmo2 model does not run" in refusals("olmo2")
    assert "a mistral model with sliding_window=7 at parallel.cp=2" in refusals("mistral", 2, sliding_window=7)
    for settled in (refusals("mistral", sliding_window=7), refusals("llama", 2)):
        assert "does not run on Transformer Engine" not in settled


@pytest.mark.slow
def test_check_refuses_fp8_for_those_layers_and_says_what_it_cannot_look_at(tiny_model, config):
    gemma = tiny_model("gemma2")
    assert "a gemma2 model does not run on Transformer" in violations(
        config, f"model.hf_path={gemma}", "precision.dtype=fp8"
    )
    done = run_cli("check", config, "precision.dtype=fp8")
    assert done.returncode == 0, done.stderr
    assert "compute capability 8.9" in done.stdout
    assert "padded to a multiple of 16" in done.stdout
    assert "Transformer Engine 2.2 and a torch for CUDA 12.1 or newer" in done.stdout
    assert "looked at when training starts, not here" in done.stdout


def test_check_refuses_matrices_that_fp8_cannot_take(config):
    """The MLP of 80 over tp=2, and 48 numbers in blocks of 32."""
    split = violations(config, "precision.dtype=fp8", "parallel.tp=2", world_size=2)
    assert "ffn_hidden_size=80, over parallel.tp=2 40 a rank, is no multiple of 16" in split
    assert "use parallel.tp=1 or precision.dtype=bf16" in split
    blocks = violations(config, "precision.dtype=fp8", "precision.fp8_recipe=mxfp8")
    assert "hidden_size=48 is no multiple of 32" in blocks
    assert "use precision.fp8_recipe=tensorwise or precision.dtype=bf16" in blocks


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_fp8_without_cuda_is_refused_with_the_reason(config):
    done = run_cli("train", config, "precision.dtype=fp8")
    assert done.returncode == 2
    assert "precision.dtype=fp8 needs a CUDA GPU" in done.stderr
    assert "Traceback" not in done.stderr


LONG = pytest.mark.long


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "/nowhere.yaml"], "no such config file"),
        (
            ["check", "CONFIG", "objective.alpha=-1", "objective.log_z=group", "rollout.responses_per_prompt=1"],
            "alpha=-1",
        ),
        pytest.param(
            ["check", "CONFIG", "parallel.pp=5"],
            "parallel.pp=5 needs 5 layers or more, and num_layers=4; choose",
            marks=pytest.mark.long,
        ),
        (["check", "CONFIG", "--world-size", "3", "parallel.tp=2"], "3 processes do not hold"),
        pytest.param(
            ["score", "--model", "MODEL", "--data", "/nowhere.jsonl", "--out", "/tmp/x"],
            "no such file",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["score", "--model", "/nowhere", "--data", "x", "--out", "y"], "no such folder", marks=pytest.mark.long
        ),
        pytest.param(
            ["score", "--model", "MODEL", "--data", "x", "--out", "y", "objective.alpha=1"],
            "has no effect here",
            marks=pytest.mark.long,
        ),
        (["export", "MODEL", "--out", "/tmp/x"], "is a Hugging Face folder already"),
        (["train"], "Missing argument"),
        (["stop", "CONFIG"], "no run has started there"),
    ],
)
def test_the_command_line_ends_with_2_and_one_line_per_violation(config, tmp_path, arguments, words):
    places = {"CONFIG": str(config), "MODEL": str(tmp_path / "model")}
    done = run_cli(*[places.get(argument, argument) for argument in arguments])
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_check_prints_the_layout_and_ends_with_0(config):
    done = run_cli("check", config, "parallel.tp=2", "parallel.pp=2", "--world-size", "8")
    assert done.returncode == 0, done.stderr
    assert "8 processes = tp 2 x cp 1 x pp 2 x dp 2" in done.stdout
    assert "dp 1   2  3" in done.stdout


@pytest.mark.parametrize("command", ["train", "check", "score", "generate", "export", "curves", "stop"])
def test_every_command_has_help_with_an_example(command):
    done = run_cli(command, "--help")
    assert done.returncode == 0
    assert "Example:" in done.stdout


def test_the_folder_of_another_run_is_not_touched(gloo, config, tmp_path):
    gloo.run(1, run_training, config, "run.num_steps=1", "run.export=false")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    text = violations(config, "objective.alpha=2", "optimizer.eps=1e-5")
    assert "is the folder of another run: its objective.alpha is 4.0, not 2.0" in text
    assert "its optimizer.eps is 1e-08, not 1e-05" in text
    assert "checkpoint.resume=never" in violations(config, "checkpoint.resume=never")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("precious")
    assert "holds other files and no run" in violations(config, f"run.output_dir={tmp_path / 'papers'}")
    assert "is a file" in violations(config, f"run.output_dir={config}")


def test_the_layout_and_the_length_of_a_run_may_change(gloo, config):
    gloo.run(1, run_training, config, "run.num_steps=1", "run.export=false")
    plan = make_plan(load_config(config, ["parallel.tp=2", "run.num_steps=9", "checkpoint.interval=3"]), 2)
    assert plan.resume_from.name == "step_000001"


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_full_disk_while_saving_keeps_the_previous_checkpoint(gloo, config, tmp_path, num_processes):
    """A limit on the size of files stands for the disk: writing fails in the middle, on every rank that writes."""
    layout = ["parallel.pp=2"] if num_processes == 2 else []
    gloo.run(num_processes, run_training, config, "run.export=false", *layout)
    checkpoints = tmp_path / "run" / "checkpoints"
    before = {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    arguments = ("train", config, "run.num_steps=4", *layout)
    done = run_cli(*arguments, num_processes=num_processes, preexec_fn=full_disk, timeout=200)
    assert "the checkpoint could not be written" in done.stderr
    assert "earlier checkpoints are untouched" in done.stderr
    assert done.returncode == 2 if num_processes == 1 else "exitcode  : 2" in done.stderr
    assert before == {path: path.read_bytes() for path in checkpoints.rglob("*") if path.is_file()}
    assert not list(checkpoints.glob("*.partial"))
    gloo.run(num_processes, run_training, config, "run.num_steps=4", *layout)
    assert (checkpoints / "latest").read_text().strip() == "step_000004"


@pytest.mark.slow
def test_a_full_disk_while_exporting_keeps_the_previous_export(gloo, config, tmp_path):
    gloo.run(1, run_training, config)
    export = tmp_path / "run" / "hf_export"
    before = {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}

    def full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = run_cli("export", tmp_path / "run", "--out", export, preexec_fn=full_disk)
    assert done.returncode == 2
    assert "the export could not be written" in done.stderr
    assert before == {path: path.read_bytes() for path in export.rglob("*") if path.is_file()}
    assert not export.with_name("hf_export.partial").exists()


def damage(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_flipped_bit_in_a_checkpoint_is_noticed(gloo, config, tmp_path):
    """Anywhere: weights, moments, metadata, the head, the position in the prompts."""
    from tests.gloo_workers import RankFailed

    gloo.run(2, run_training, config, "run.num_steps=1", "run.export=false")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "SHA256SUMS"]
    assert {path.name for path in files} >= {".metadata", "progress.json", "log_z_head.safetensors", "config.json"}
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=checkpoint).returncode == 0
    originals = [path.read_bytes() for path in files]
    for path in files:
        damage(path)
    with pytest.raises(RankFailed) as caught:
        gloo.run(1, check_checkpoint, checkpoint)
    assert all(f"{path.relative_to(checkpoint)} is damaged" in caught.value.violations[0] for path in files)
    for path, original in zip(files, originals, strict=True):
        path.write_bytes(original)
    damage(max(files, key=lambda path: path.stat().st_size))
    with pytest.raises(RankFailed) as caught:
        gloo.run(2, run_training, config)
    assert caught.value.kind == "UserError"
    assert "is damaged" in caught.value.violations[0]


def check_checkpoint(checkpoint: Path) -> None:
    from megatron_powerflow.checkpoint.digests import check_share

    check_share(checkpoint, rank=0, world_size=1)


def test_a_checkpoint_that_lost_a_file_is_named(gloo, config, tmp_path):
    from tests.gloo_workers import RankFailed

    gloo.run(1, run_training, config, "run.num_steps=1", "run.export=false")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_000001"
    (checkpoint / "progress.json").write_text("{}")
    with pytest.raises(RankFailed) as caught:
        gloo.run(1, run_training, config)
    assert caught.value.kind == "UserError"
    assert "step_000001, which latest names, is not whole: progress.json is damaged" in caught.value.violations[0]
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_000099\n")
    assert "names step_000099, which is not there" in violations(config)


def test_a_list_of_digests_names_nothing_outside_the_checkpoint(tmp_path):
    from megatron_powerflow.checkpoint.digests import check_share

    for name in ("../outside", "/etc/passwd", "policy/../../outside"):
        (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(UserError, match="not lines of"):
            check_share(tmp_path, 0, 1)
