"""A store of reference scores: one pass for a sweep, and runs bit-equal to those without a store, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_powerflow.converter.inspect import describe, inspect
from megatron_powerflow.reference_store.folder import count_store
from tests.distributed.megatron_sessions import run_training

NUM_PROMPTS = 8
PACKED = ["parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=96"]
MADE_ANEW = ("seconds", "per_second", "bytes", "reference_passes", "reference_known")


def write_config(folder: Path, model: Path) -> Path:
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt_token_ids": [5 + i, 6, *range(20, 20 + i)]} for i in range(NUM_PROMPTS)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(
        f"""
model: {{hf_path: {model}}}
precision: {{dtype: fp32}}
prompts: {{path: {prompts}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 4, max_prompt_tokens: 16, max_response_tokens: 8}}
parallel: {{micro_batch_size: 2}}
objective: {{alpha: 4, log_z: group}}
optimizer: {{lr: 1e-3}}
checkpoint: {{interval: 0}}
metrics: {{wandb: "off", curves: false}}
run: {{num_steps: 2, export: false, output_dir: {folder / "saved"}}}
"""
    )
    return folder / "config.yaml"


def counted_training(config: Path, *overrides: str) -> int:
    """`run_training`; returns the micro-batches that this rank's reference has scored in its steps."""
    from megatron_powerflow.training import known_scores

    original, counted = known_scores.score, []

    def score(chunks, batches, scorer):
        counted.extend(batches)
        return original(chunks, batches, scorer)

    known_scores.score = score
    try:
        run_training(config, *overrides)
    finally:
        known_scores.score = original
    return len(counted)


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers_of(run: Path) -> list[dict]:
    """The lines without what another start, or a store, makes otherwise."""
    return [{k: v for k, v in line.items() if not k.endswith(MADE_ANEW)} for line in lines_of(run)]


def proof_of(run: Path) -> dict:
    """The sums of weights and moments in the last checkpoint, which every bit counts in."""
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    return json.loads((last / "progress.json").read_text())["proof"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, ["parallel.tp=2", "parallel.sequence_parallel=true", *PACKED]),
        (2, ["parallel.pp=2", "model.reference=swap"]),
        (2, ["optimizer.updates_per_rollout=2", *PACKED]),
        pytest.param(4, ["parallel.cp=2", "parallel.tp=2", *PACKED], marks=pytest.mark.long),
        pytest.param(2, ["parallel.pp=2", "parallel.vpp=2"], marks=pytest.mark.long),
    ],
    ids=["tp2", "pp2", "dp2", "tp2 cp2", "pp2 vpp2"],
)
def test_runs_over_the_same_rollouts_make_one_reference_pass(gloo, tiny_model, tmp_path, ranks, settings):
    config, store = write_config(tmp_path, tiny_model("llama")), f"model.reference_store={tmp_path / 'store'}"
    gloo.run(ranks, run_training, config, "rollout.save=true", "evaluation.samples=0", *settings)
    replay = [f"rollout.replay={tmp_path / 'saved'}", *settings]

    def run(name: str, *overrides: str) -> tuple[list[int], Path]:
        out = tmp_path / name
        return gloo.run(ranks, counted_training, config, *replay, *overrides, f"run.output_dir={out}"), out

    counts, first = run("first", store)
    assert all(counts)
    assert [line["reference_known"] for line in lines_of(first)] == [0.0, 0.0]
    sharper = ["objective.alpha=2", "objective.psi=-0.5"]
    _, fresh = run("fresh", *sharper)
    counts, second = run("second", store, *sharper)
    assert counts == [0] * ranks, "the second run has scored what the first had"
    assert [(line["reference_passes"], line["reference_known"]) for line in lines_of(second)] == [(0.0, 1.0)] * 2
    assert proof_of(second) == proof_of(fresh) != proof_of(first)
    assert numbers_of(second) == numbers_of(fresh)
    passes = [line["reference_passes"] for line in lines_of(fresh)]
    assert passes == [line["reference_passes"] for line in lines_of(first)]

    (count,), notes = count_store(tmp_path / "store")
    assert (count.num_passes, count.num_responses, notes) == (sum(passes), 2 * 16, [])
    assert count.about["temperature"] == 1.0
    assert count.about["weights"]
    assert f"{2 * 16} responses" in describe(inspect(tmp_path / "store"))
