"""Saved rollouts train again: the same run, without an engine, under other layouts, after a crash."""

from __future__ import annotations

import json

import pytest

from megatron_powerflow.rollout.rollout_files import read_rollouts
from tests.distributed.megatron_sessions import run_training
from tests.gloo_workers import RankFailed

PROMPTS = [[5, 6, 7], [9, 10], [11, 12, 13, 14, 15], [20]]
PACKED_CP2 = ["parallel.cp=2", "parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=40"]
NAMES = ("loss", "grad_norm", "residual_mean", "log_z_mean", "policy_entropy", "sampler_gap_max")


def write_run(folder, model):
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in PROMPTS))
    (folder / "config.yaml").write_text(
        f"""
model: {{hf_path: {model}}}
precision: {{dtype: fp32}}
prompts: {{path: {folder / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 8}}
parallel: {{micro_batch_size: 2}}
objective: {{log_z: group}}
optimizer: {{lr: 1e-3}}
metrics: {{wandb: "off", curves: false}}
run: {{num_steps: 2, export: false, output_dir: {folder / "saved"}}}
"""
    )
    return folder / "config.yaml"


def metrics_of(run) -> list[list[float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[line[name] for name in NAMES] for line in lines]


def no_engine(config_file, *overrides: str) -> str:
    """`run_training` where the engine cannot be asked for anything."""
    from megatron_powerflow.rollout.megatron_engine import MegatronEngine

    original = MegatronEngine.generate

    def refuse(*_):
        raise AssertionError("the engine was asked to sample")

    MegatronEngine.generate = refuse
    try:
        return run_training(config_file, *overrides)
    finally:
        MegatronEngine.generate = original


@pytest.mark.slow
def test_a_replay_is_the_run_without_its_engine_and_a_crash_loses_no_rollouts(gloo, tiny_model, tmp_path):
    config = write_run(tmp_path, tiny_model("qwen2"))
    gloo.run(2, run_training, config, "rollout.save=true", "evaluation.samples=0")
    saved = sorted((tmp_path / "saved" / "rollouts").iterdir())
    assert [path.name for path in saved] == ["step_000000.jsonl", "step_000001.jsonl"]
    rollouts = read_rollouts(saved[0], vocab_size=307)
    assert [(r.slot, r.response_index) for r in rollouts] == [(s, i) for s in range(4) for i in range(2)]

    replay = f"rollout.replay={tmp_path / 'saved'}"
    for number, (num_ranks, overrides) in enumerate([(2, []), (2, ["parallel.pp=2"]), (4, PACKED_CP2)]):
        out = tmp_path / f"replay{number}"
        gloo.run(num_ranks, no_engine, config, replay, f"run.output_dir={out}", *overrides)
        exact = not overrides
        for ours, theirs in zip(metrics_of(out), metrics_of(tmp_path / "saved"), strict=True):
            assert ours == (theirs if exact else pytest.approx(theirs, rel=1e-3, abs=1e-4))

    gloo.run(2, run_training, config, "rollout.save=true", f"run.output_dir={tmp_path / 'cp'}", "parallel.cp=2")
    sampled = read_rollouts(tmp_path / "cp" / "rollouts" / saved[0].name, vocab_size=307)
    assert [r.response_token_ids for r in sampled] == [r.response_token_ids for r in rollouts]

    # the run again as a crash in its first step leaves it: rollouts of step 0 in hand, no checkpoint
    again = tmp_path / "again"
    (again / "rollouts").mkdir(parents=True)
    (again / "rollouts" / saved[0].name).write_bytes(saved[0].read_bytes())
    (again / "config.yaml").write_text(
        (tmp_path / "saved" / "config.yaml").read_text().replace(str(tmp_path / "saved"), str(again))
    )
    arguments = ("rollout.save=true", "evaluation.samples=0", f"run.output_dir={again}")
    gloo.run(2, no_engine, config, "run.num_steps=1", *arguments)
    assert metrics_of(again) == metrics_of(tmp_path / "saved")[:1]
    gloo.run(2, run_training, config, *arguments)  # the second step has to be sampled
    assert metrics_of(again) == metrics_of(tmp_path / "saved")


def test_rollouts_that_do_not_fit_are_refused_before_anything_starts(gloo, tiny_model, tmp_path):
    config = write_run(tmp_path, tiny_model("qwen2"))
    gloo.run(1, run_training, config, "rollout.save=true", "evaluation.samples=0", "run.num_steps=1")
    other = f"model.hf_path={tiny_model('qwen3')}"
    wrong = ["rollout.responses_per_prompt=4", "rollout.temperature=0.5", other]
    replay = (f"rollout.replay={tmp_path / 'saved'}", f"run.output_dir={tmp_path / 'replay'}")
    with pytest.raises(RankFailed) as caught:
        gloo.run(1, run_training, config, *replay, *wrong)
    text = "\n".join(caught.value.violations)
    assert caught.value.kind == "UserError"
    for words in ("no rollouts of step 1", "responses_per_prompt is 2", "temperature is 1.0", "vocab_size is 307"):
        assert words in text, text
    assert not (tmp_path / "replay").exists()
