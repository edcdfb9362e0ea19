"""Runs that diverge, for real: what ends them, what they leave, and whether their advice works to the letter."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.distributed.megatron_sessions import run_training
from tests.gloo_workers import RankFailed


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{i}", "prompt_token_ids": [5 + i, 6, 7]}) + "\n" for i in range(4)))
    shutil.copytree(tiny_model("llama"), tmp_path / "model")
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tmp_path / "model"}}}
precision: {{dtype: fp32}}
prompts: {{path: {prompts}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
objective: {{alpha: 2, log_z: group}}
optimizer: {{lr: 1e-3, max_skipped_steps: 2}}
checkpoint: {{interval: 1}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 4, output_dir: {tmp_path / "run"}}}
"""
    )
    return path


def change_weights(model: Path, name: str, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors[name])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def refusal(gloo, num_processes: int, config: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(RankFailed) as caught:
        gloo.run(num_processes, run_training, config, *overrides)
    assert caught.value.kind == "UserError", caught.value
    return caught.value.violations


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("model.layers.1.mlp.down_proj.weight", ()),
        ("model.layers.3.self_attn.k_proj.weight", ("parallel.tp=2",)),
        ("model.norm.weight", ("parallel.pp=2", "model.reference=swap")),
    ],
)
def test_a_base_that_is_not_finite_is_refused_before_a_rollout(gloo, config, tmp_path, name, layout):
    """The tensor is named, also where a rank of its own holds it, and where Megatron keeps it with others in one."""
    change_weights(tmp_path / "model", name, lambda tensor: tensor.view(-1)[-1].fill_(float("nan")))
    (text,) = refusal(gloo, 2 if layout else 1, config, *layout)
    assert f"{tmp_path / 'model'}: NaN or infinity in {name}; no log-prob" in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_base_whose_scores_are_not_finite_is_refused_before_a_rollout(gloo, config, tmp_path):
    """Every weight is finite; the square of an activation is not."""
    change_weights(tmp_path / "model", "model.layers.1.mlp.down_proj.weight", lambda tensor: tensor.fill_(1e38))
    (text,) = refusal(gloo, 1, config)
    assert "the base gives 4 of 4 prompts log-probs that are not finite, to prompt p" in text
    assert "though its weights are" in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_sampler_gap_is_refused_before_the_first_update_and_after_a_resume(gloo, config, tmp_path):
    """A bound below fp32's rounding stands for a sampler that disagrees."""
    run, low = tmp_path / "run", "alarm.sampler_gap=1e-9"
    (text,) = refusal(gloo, 2, config, low, "parallel.tp=2")
    assert re.match(
        r"sampler_gap_mean is \S+ nats per token at the first batch, above 1e-09 \(alarm.sampler_gap\)", text
    )
    assert not (run / "checkpoints").exists()
    gloo.run(1, run_training, config, "run.num_steps=1", "run.export=false")
    (text,) = refusal(gloo, 1, config, low)
    assert "Nothing was updated" in text
    assert (run / "checkpoints" / "latest").read_text() == "step_000001\n"
    gloo.run(1, run_training, config, "alarm.sampler_gap=1e-2", "run.num_steps=2", "run.export=false")  # as it advises


def commands_of(text: str) -> list[list[str]]:
    """What the message tells to type, as it stands."""
    found = re.findall(r"powerflow (?:train|score) .*?(?=\. What the last|$)", text)
    return [shlex.split(command)[1:] for command in found]


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        (("optimizer.lr=1e16",), ()),
        pytest.param(
            *(("optimizer.lr=1e16", "objective.log_z=mlp"), ("parallel.tp=2", "parallel.pp=2")), marks=pytest.mark.slow
        ),
    ],
)
def test_a_run_that_only_skips_stops_and_leaves_its_last_step(gloo, config, tmp_path, settings, layout):
    """lr 1e16: after the first update no log-prob is a number."""
    (text,) = refusal(gloo, 4 if layout else 1, config, *settings, *layout)
    assert "2 steps in a row had a loss or gradient that is not finite; the weights are those before them" in text
    run, dump = tmp_path / "run", tmp_path / "run" / "dump_step_000003"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["num_skipped"] for line in lines] == [0, 1, 2]
    assert all("grad_norm" not in line for line in lines[1:])
    about = json.loads((dump / "dump.json").read_text())
    scores = [json.loads(line) for line in (dump / "scores.jsonl").read_text().splitlines()]
    assert about["step"] == 3
    assert len(scores) == 8
    assert all({"sequence_log_prob", "residual", "loss_term"} <= set(line["not_finite"]) for line in scores)
    assert all(line["ref_sequence_log_prob"] < 0 for line in scores)  # the base is sound
    assert (
        about["responses_not_finite"] == [line["id"] for line in scores] == [f"p{i}/{j}" for i, j in order_of(scores)]
    )
    assert about["weights_not_finite"] == []
    assert ["model.embed_tokens.weight"] in about["gradients_not_finite"]
    assert Path(about["checkpoint"]) == tmp_path / "model"  # step 1 was saved, and is no `latest`: step 2 was skipped
    assert not (run / "checkpoints" / "latest").exists()
    assert not list(run.glob("*.partial"))
    assert not list(dump.rglob("*.lock"))


def order_of(scores: list[dict]) -> list[tuple[int, int]]:
    return [(int(line["id"][1:].split("/")[0]), int(line["id"].split("/")[1])) for line in scores]


@pytest.mark.slow
def test_the_advice_works_when_it_is_followed_to_the_letter(gloo, config, tmp_path):
    """lr 1e30: log-probs stay finite, gradients do not. The dump scores again to the step's numbers; the run starts
    anew."""
    (text,) = refusal(gloo, 1, config, "optimizer.lr=1e30")
    start_anew, score_again = commands_of(text)
    done = run_cli(*score_again)
    assert done.returncode == 0, done.stderr
    assert "not finite" not in done.stdout
    dump = tmp_path / "run" / "dump_step_000003"
    recorded = [json.loads(line) for line in (dump / "scores.jsonl").read_text().splitlines()]
    again = [json.loads(line) for line in Path(score_again[score_again.index("--out") + 1]).read_text().splitlines()]
    assert [line["id"] for line in again] == [line["id"] for line in recorded]
    for ours, theirs in zip(again, recorded, strict=True):
        assert ours["sequence_log_prob"] == pytest.approx(theirs["sequence_log_prob"], rel=1e-5)
    base = shlex.split(json.loads((dump / "dump.json").read_text())["commands"]["base"])[1:]
    assert run_cli(*base).returncode == 0
    of_base = [json.loads(line) for line in Path(base[base.index("--out") + 1]).read_text().splitlines()]
    for ours, theirs in zip(of_base, recorded, strict=True):
        assert ours["sequence_log_prob"] == pytest.approx(theirs["ref_sequence_log_prob"], rel=1e-5)
    done = run_cli(*start_anew)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run_again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["num_skipped"] for line in lines] == [0, 0, 0, 0]
    assert (tmp_path / "run_again" / "hf_export" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_dump_whose_log_probs_are_no_numbers_scores_to_which(gloo, config, tmp_path):
    (text,) = refusal(gloo, 1, config, "optimizer.lr=1e16")
    *_, score_again = commands_of(text)
    done = run_cli(*score_again)
    assert done.returncode == 0, done.stderr
    assert "8 of 8 responses have log-probs that are not finite:" in done.stdout
    assert re.search(r"  p\d/\d: \d of \d tokens, the first is 1", done.stdout)


def test_an_objective_that_is_never_finite_is_told_from_a_rate_that_is_too_high(gloo, config, tmp_path):
    """alpha 1e30 overflows in the first loss: another rate would change nothing, and is not what is advised."""
    (text,) = refusal(gloo, 1, config, "objective.alpha=1e30")
    assert "the weights are the base's still, for no step of this run was finite" in text
    (start_anew, _) = commands_of(text)
    assert start_anew[-1] == "objective.psi=null"
    assert "objective.alpha=null" in start_anew
    gloo.run(1, run_training, Path(start_anew[1]), *start_anew[2:], "run.num_steps=1", "run.export=false")
    assert json.loads((tmp_path / "run_again" / "metrics.jsonl").read_text())["num_skipped"] == 0


def test_a_finite_objective_that_is_absurd_trains(gloo, config, tmp_path):
    """alpha 1e6: the loss is 1e12 and finite, the gradient is clipped, nothing is skipped."""
    gloo.run(1, run_training, config, "objective.alpha=1e6", "run.export=false", "run.num_steps=2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["num_skipped"] for line in lines] == [0, 0]
    assert all(line["loss"] > 1e9 and line["grad_norm"] > 1e5 for line in lines)
