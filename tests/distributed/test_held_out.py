"""Held-out prompts are answered while training goes on, the same under every layout; the alarm can end a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_powerflow.config_file import load_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.change import changes_of
from megatron_powerflow.metrics.step_log import read_step_log
from megatron_powerflow.metrics.writers import read_metrics
from megatron_powerflow.training.plan import make_plan
from tests.distributed.megatron_sessions import config_for, run_training


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    model = tiny_model("llama", vocab_size=10, scale=0.2, boxes=True, eos_token_id=2)
    for name, answer in (("train", None), ("held_out", "1")):
        lines = [{"prompt_token_ids": [5 + i % 4, 7], **({"answer": answer} if answer else {})} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {model}}}
precision: {{dtype: fp32}}
prompts: {{path: {tmp_path / "train.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 4, max_prompt_tokens: 8, max_response_tokens: 6}}
objective: {{log_z: group}}
optimizer: {{lr: 1e-2}}
evaluation: {{prompts: {tmp_path / "held_out.jsonl"}, num_responses: 8, interval: 2, samples: 1}}
metrics: {{wandb: "off", curves: false}}
run: {{num_steps: 3, export: false, output_dir: {tmp_path / "run"}}}
"""
    )
    return path


def test_evaluations_are_written_when_due_and_alike_under_every_layout(gloo, config, tmp_path):
    gloo.run(1, run_training, config)
    lines = read_step_log(tmp_path / "run" / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert lines[0]["num_prompts"] == 6
    assert 0 < lines[0]["accuracy"] < 1
    assert set(lines[0]["pass_at"]) == {"1", "2", "4", "8"}
    assert lines[0]["pass_at"]["1"] == pytest.approx(lines[0]["accuracy"])
    assert lines[0]["policy_entropy"] > 0
    # at first the policy is the base model; afterwards it is not
    assert lines[0]["ref_log_prob_mean"] == pytest.approx(-lines[0]["policy_entropy"], rel=1e-4)
    assert lines[0]["alpha_realised"] == pytest.approx(1.0, abs=1e-3)
    assert lines[2]["ref_log_prob_mean"] != pytest.approx(-lines[2]["policy_entropy"], rel=1e-3)
    changes = changes_of(lines)
    assert [len(change.before) for change in changes.quantities] == [6] * 4
    for name, num_ranks, layout in (
        ("pp2", 2, ["parallel.pp=2"]),
        ("dp2", 2, ["parallel.micro_batch_size=2"]),
        ("packed", 2, ["parallel.max_tokens_per_micro_batch=32"]),
    ):
        gloo.run(num_ranks, run_training, config, f"run.output_dir={tmp_path / name}", *layout)
        for ours, theirs in zip(read_step_log(tmp_path / name / "evaluations.jsonl"), lines, strict=True):
            assert ours["accuracy"] == theirs["accuracy"]
            assert ours["pass_at"] == theirs["pass_at"]
            for quantity in ("policy_entropy", "ref_log_prob_mean", "alpha_realised"):
                assert ours[quantity] == pytest.approx(theirs[quantity], rel=1e-4)
            assert ours["by_prompt"]["ref_log_prob_mean"] == pytest.approx(
                theirs["by_prompt"]["ref_log_prob_mean"], rel=1e-4
            )


def test_samples_are_as_long_as_they_may_be_and_no_longer(gloo, config, tmp_path):
    """On a 70B three answers of 4,096 tokens take minutes, before the first step."""
    lengths = {}
    for limit in (2, 100):
        settings = ("run.num_steps=1", f"run.output_dir={tmp_path / str(limit)}", "evaluation.samples=6")
        gloo.run(1, run_training, config, *settings, f"evaluation.sample_tokens={limit}")
        lines = read_step_log(tmp_path / str(limit) / "samples.jsonl")
        assert [line["step"] for line in lines] == [0] * 6 + [1] * 6
        lengths[limit] = [line["num_response_tokens"] for line in lines]
    assert lengths[2] == [min(length, 2) for length in lengths[100]]
    assert 2 < max(lengths[100]) <= load_config(config, ()).rollout.max_response_tokens


@pytest.mark.slow
def test_the_alarm_of_a_resumed_run_is_that_of_its_log(gloo, config, tmp_path):
    """Nothing is trained (lr 0), and the log of the steps before tells of a collapse to cut responses."""
    common = ["optimizer.lr=0", "checkpoint.interval=1", "rollout.prompts_per_step=6"]  # 16 + 8 steps for the test
    gloo.run(1, run_training, config, "run.num_steps=24", *common)
    lines = read_metrics(tmp_path / "run")
    assert [line["alarm"] for line in lines] == [0.0] * 24
    metrics = "".join(
        json.dumps(line | {"truncated_fraction": float(number >= 16), "truncated_fraction_error": 0.01}) + "\n"
        for number, line in enumerate(lines)
    )
    (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
    # on other ranks, and with the option given only now: it ends the run before its next step
    settings = [*common, "run.num_steps=30", "run.stop_on_alarm=[length]"]
    gloo.run(2, run_training, config, *settings)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == metrics
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_000024"
    # an alarm that was not named ends nothing, and is told
    gloo.run(1, run_training, config, *common, "run.num_steps=26", "run.stop_on_alarm=[short,loss]")
    after = read_metrics(tmp_path / "run")[24:]
    assert [(line["alarm"], line["alarm_length"], line["alarm_short"]) for line in after] == [(1.0, 1.0, 0.0)] * 2


def test_only_the_first_held_out_prompts_are_answered_where_a_number_is_given(config):
    plan = make_plan(load_config(config, ["evaluation.num_prompts=2"]), 1)
    assert [prompt.id for prompt in plan.evaluation_prompts] == ["0", "1"]
    with pytest.raises(UserError, match=r"evaluation\.num_prompts"):
        load_config(config, ["evaluation.num_prompts=2", "evaluation.prompts=null", "evaluation.num_responses=null"])


def test_a_gold_reward_needs_answers(tiny_model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5], "answer": "1"}\n{"prompt_token_ids": [6]}\n')
    config = config_for(tiny_model("llama"), tmp_path / "prompts.jsonl", tmp_path / "run", "objective.preset=grpo")
    with pytest.raises(UserError, match="1 of 2 prompts have no gold answer \\(id '1' first\\)"):
        make_plan(config, 1)
