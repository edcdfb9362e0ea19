"""A store of reference scores: one pass for a sweep, and runs bit-equal to those without a store, also after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_powerflow.config_file import load_config
from megatron_powerflow.converter.inspect import describe, inspect
from megatron_powerflow.errors import UserError
from megatron_powerflow.reference_store.folder import count_store
from megatron_powerflow.reference_store.index import ENTRY_BYTES, index_files
from megatron_powerflow.training.plan import make_plan
from megatron_powerflow.training.plan_lines import describe as describe_plan
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
    ],
    ids=["tp2", "pp2", "dp2", "tp2 cp2"],
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


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "family", "settings"),
    [
        (2, "llama", ["parallel.pp=2", "parallel.vpp=2"]),
        (4, "mixtral", ["parallel.ep=2", "parallel.pp=2", *PACKED]),
        (2, "mixtral", ["parallel.ep=2"]),
    ],
    ids=["pp2 vpp2", "ep2 pp2", "ep2"],
)
def test_what_the_store_has_lost_is_scored_again_by_all_who_share_the_pass(
    gloo, tiny_model, tmp_path, ranks, family, settings
):
    """Interleaved stages take turns of pp micro-batches; replicas that share experts make every pass together."""
    config, store = write_config(tmp_path, tiny_model(family)), f"model.reference_store={tmp_path / 'store'}"
    arguments = ["evaluation.samples=0", *settings]
    gloo.run(ranks, run_training, config, "rollout.save=true", *arguments)
    replay = [f"rollout.replay={tmp_path / 'saved'}", *settings]
    runs = [tmp_path / name for name in ("filling", "half", "whole")]
    gloo.run(ranks, run_training, config, *replay, store, f"run.output_dir={runs[0]}")
    index = index_files(tmp_path / "store")[0]  # of one replica
    entries = index.read_bytes()
    index.write_bytes(entries[: len(entries) // ENTRY_BYTES // 2 * ENTRY_BYTES - 20])
    for run in runs[1:]:
        gloo.run(ranks, run_training, config, *replay, store, f"run.output_dir={run}")
        assert proof_of(run) == proof_of(runs[0]) == proof_of(tmp_path / "saved")
        assert numbers_of(run) == numbers_of(runs[0])
    every, some, none = (sum(line["reference_passes"] for line in lines_of(run)) for run in runs)
    assert every > some > none == 0
    assert len(index_files(tmp_path / "store")) > (2 if "parallel.ep=2" in settings else 1)


KILLED = """
import os, signal, sys
from pathlib import Path
import megatron_powerflow.reference_store.store as store
from tests.distributed.megatron_sessions import run_training

original, appended = store.append, []

def append(path, content):
    appended.append(path)
    if len(appended) < 4:  # values and entries of step 0, values of step 1
        return original(path, content)
    with path.open("ab") as file:
        file.write(content[:100])
    os.kill(os.getpid(), signal.SIGKILL)

store.append = append
from megatron_powerflow.parallel.initialize import prepare_imports
prepare_imports()
run_training(Path(sys.argv[1]), *sys.argv[2:])
"""


@pytest.mark.slow
def test_a_run_killed_while_it_wrote_its_scores_goes_on_and_ends_bit_equal(gloo, tiny_model, tmp_path):
    config = write_config(tmp_path, tiny_model("llama"))
    common = ["evaluation.samples=0", "rollout.save=true", "rollout.buffer_steps=1"]
    common += ["checkpoint.interval=1", "checkpoint.asynchronous=false"]
    arguments = [*common, f"model.reference_store={tmp_path / 'store'}", f"run.output_dir={tmp_path / 'run'}"]
    killed = subprocess.run([sys.executable, "-c", KILLED, config, *arguments], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    gloo.run(1, run_training, config, *arguments)
    gloo.run(1, run_training, config, *common, f"run.output_dir={tmp_path / 'fresh'}")
    assert proof_of(tmp_path / "run") == proof_of(tmp_path / "fresh")
    assert numbers_of(tmp_path / "run") == numbers_of(tmp_path / "fresh")
    # step 1 trains on the rollouts of step 0, too, whose scores are all found; of its own one entry of 88 bytes came
    # onto the disk, and a part of the next
    assert [line["reference_passes"] for line in lines_of(tmp_path / "run")] == [8, 7]
    assert [line["reference_known"] for line in lines_of(tmp_path / "run")] == [0, 1 / 8]
    assert lines_of(tmp_path / "run")[1]["num_rollouts_trained"] == 32


def described(config: Path, *overrides: str) -> str:
    plan = make_plan(load_config(config, overrides), 1)
    return describe_plan(plan)


@pytest.mark.slow
def test_a_check_says_what_the_store_holds_and_runs_that_sample_share_their_first_step(gloo, tiny_model, tmp_path):
    config, store = write_config(tmp_path, tiny_model("llama")), f"model.reference_store={tmp_path / 'store'}"
    assert "which is made when training starts" in described(config, store)
    assert not (tmp_path / "store").exists()
    gloo.run(1, run_training, config, store, "evaluation.samples=0", "run.num_steps=1")
    elsewhere = f"run.output_dir={tmp_path / 'other'}"
    assert "holds 16 responses of 8 passes of this base" in described(config, store, elsewhere)
    assert "holds 0 responses" in described(config, store, elsewhere, "rollout.temperature=0.5")
    assert "holds 0 responses" in described(config, store, elsewhere, f"model.hf_path={tiny_model('qwen3')}")
    gloo.run(1, run_training, config, store, "evaluation.samples=0", elsewhere, "objective.alpha=2")
    assert [line["reference_known"] for line in lines_of(tmp_path / "other")] == [1, 0], "the base's own responses"
    with pytest.raises(UserError, match="lie in one another"):
        described(config, f"model.reference_store={tmp_path / 'saved' / 'store'}")
