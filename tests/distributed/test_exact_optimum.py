"""`powerflow train` reaches each objective's exact optimum on an enumerable model.

Vocabulary 6 (five symbols and EOS), at most 4 tokens: 781 responses, those cut at 4 tokens included (they keep their
mass: objective.truncated=keep). Normalisers by bisection; the trained policy is read from the exported folder.

    la_tb, tb_token_score, rl_token   pi* ~ p_base^alpha exp(-lambda n)
    la_tb under a tilt cap M          p_base^alpha exp(-lambda min(n, M))
    tb_traj, rl_traj                  p_alpha ~ p_base^alpha
    tb_token_target                   ~ p_base^(alpha / n)

With rollout.buffer_steps two thirds of the rollouts are of earlier policies: the optimum is the same.

tb_token_step has no such optimum: its residual belongs to a token, and no policy makes all of them 0.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import numpy as np
import pytest

from tests.distributed.megatron_sessions import run_training
from tests.enumerable import LENGTHS, MAX_TOKENS, RESPONSES, log_probs_of, make_enumerable, realised_alpha_of
from tests.gloo_workers import GlooWorkers


def optimum(energy: np.ndarray, tilt: np.ndarray) -> tuple[np.ndarray, float]:
    """exp(energy - lambda * tilt) and lambda, the root of its sum = 1."""
    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.exp(energy - middle * tilt).sum() > 1 else (low, middle)
    return np.exp(energy - middle * tilt), middle


@pytest.fixture(scope="module")
def enumerable(tmp_path_factory) -> tuple[Path, Path]:
    """(model folder, config file)."""
    folder = tmp_path_factory.mktemp("enumerable")
    model, prompts = make_enumerable(folder, scale=0.05, seed=6)
    (folder / "config.yaml").write_text(
        f"model: {{hf_path: {model}}}\nprompts: {{path: {prompts}}}\nrun: {{output_dir: {folder / 'run'}}}\n"
    )
    return model, folder / "config.yaml"


def test_the_enumeration_is_complete(enumerable):
    assert len(RESPONSES) == 781
    assert np.exp(log_probs_of(enumerable[0])).sum() == pytest.approx(1.0, abs=1e-9)


# of each run its alpha, its preset and what else is set
CASES = {
    **{
        f"la_tb-{log_z}-{alpha}": (alpha, "la_tb", (f"objective.log_z={log_z}",))
        for log_z in ("mlp", "group")
        for alpha in (0.5, 2, 4)
    },
    **{f"la_tb-{log_z}-2": (2, "la_tb", (f"objective.log_z={log_z}",)) for log_z in ("scalar", "loo", "contrastive")},
    "la_tb-tilt_cap-4": (4, "la_tb", ("objective.log_z=group", "objective.tilt_cap=2")),
    "la_tb-warmup-4": (4, "la_tb", ("objective.log_z=group", "objective.alpha_warmup_steps=100")),
    **{
        f"la_tb-buffer-{log_z}-4": (
            4,
            "la_tb",
            (f"objective.log_z={log_z}", "rollout.buffer_steps=2", "rollout.save=true"),
        )
        for log_z in ("mlp", "group")
    },
    "tb_token_score-2": (2, "tb_token_score", ("objective.log_z=group",)),
    "tb_token_target-2": (2, "tb_token_target", ("objective.log_z=group",)),
    **{f"tb_traj-{alpha}": (alpha, "tb_traj", ("objective.log_z=group",)) for alpha in (0.5, 2, 4)},
    **{f"rl_traj-{alpha}": (alpha, "rl_traj", ()) for alpha in (0.5, 2, 4)},
    "rl_token-2": (2, "rl_token", ()),
}
# those whose policy must show the alpha that it was trained towards; of all cases they are those that CI runs
REALISED = ("la_tb-group-4", "tb_traj-4", "rl_token-2")
IN_CI = REALISED[:1]


def target_of(name: str, base: np.ndarray) -> tuple[np.ndarray, float]:
    alpha, preset, settings = CASES[name]
    ones = np.ones_like(base)
    if preset in ("tb_traj", "rl_traj"):
        return optimum(alpha * base, ones)
    if preset == "tb_token_target":
        return optimum(alpha * base / LENGTHS, ones)
    return optimum(alpha * base, np.minimum(LENGTHS, 2) if "objective.tilt_cap=2" in settings else LENGTHS)


@pytest.fixture(scope="module")
def trained(request, enumerable, tmp_path_factory) -> dict[str, Future]:
    """Every case's run folder, made two at a time (each is too small for a second core) by two processes that stay."""
    _, config = enumerable
    folder = tmp_path_factory.mktemp("trained")

    def run(name: str) -> Path:
        alpha, preset, settings = CASES[name]
        command = [
            *(f"objective.preset={preset}", f"objective.alpha={alpha}", *settings),
            "precision.dtype=fp32",
            "rollout.prompts_per_step=1",
            "rollout.responses_per_prompt=512",
            "rollout.max_prompt_tokens=8",
            f"rollout.max_response_tokens={MAX_TOKENS}",
            "rollout.max_concurrent_rows=512",
            "parallel.micro_batch_size=512",
            "optimizer.lr=3e-3",
            "optimizer.lr_decay=cosine",
            "run.num_steps=400",
            f"run.output_dir={folder / name}",
            "checkpoint.interval=0",
            "metrics.wandb=off",
            "metrics.curves=false",
            "evaluation.samples=0",
        ]
        worker = idle.get()
        try:
            worker.run(1, run_training, config, *command)
        finally:
            idle.put(worker)
        return folder / name

    workers, idle = [GlooWorkers(max_ranks=1) for _ in range(2)], Queue()
    for worker in workers:
        idle.put(worker)
    with ThreadPoolExecutor(len(workers)) as pool:
        asked_for = [name for name in CASES if any(f"[{name}]" in item.name for item in request.session.items)]
        yield {name: pool.submit(run, name) for name in asked_for}
    for worker in workers:
        worker.stop()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in IN_CI else pytest.mark.long) for name in CASES]
)
def test_training_reaches_the_exact_optimum(enumerable, trained, record_property, name):
    model, _ = enumerable
    folder = trained[name].result()
    base = log_probs_of(model)
    target, lagrange = target_of(name, base)
    distance = 0.5 * np.abs(np.exp(log_probs_of(folder / "hf_export")) - target).sum()
    base_distance = 0.5 * np.abs(np.exp(base) - target).sum()
    record_property("total_variation", distance)
    record_property("total_variation_of_base", base_distance)
    assert base_distance > 0.1  # there was something to learn
    assert distance <= 0.02
    if name in REALISED:
        found = realised_alpha_of(log_probs_of(folder / "hf_export"), base)
        record_property("alpha_realised", found["alpha_realised"])
        assert found["alpha_realised"] == pytest.approx(CASES[name][0], abs=0.02)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    if "log_z_mean" in last:
        record_property("log_z_minus_lambda", last["log_z_mean"] - lagrange)
        assert last["log_z_mean"] == pytest.approx(lagrange, abs=0.02)
