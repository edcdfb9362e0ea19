"""A rehearsal against what is known of the 70B, and against bytes that a real run was seen to take.

Each rehearsal is a process of its own: it can compute nothing afterwards.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.rehearsed_memory import RUNS, compare
from megatron_powerflow.rehearsal.devices import GIB
from tests.published_configs import PUBLISHED


def check(folder, *arguments: str, recipe: str = "llama31_70b") -> subprocess.CompletedProcess:
    config = f"megatron_powerflow/recipes/{recipe}.yaml"
    command = [sys.executable, "-m", "megatron_powerflow.cli", "check", config, f"model.hf_path={folder}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def llama70(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama70")
    (folder / "config.json").write_text(json.dumps(PUBLISHED["meta-llama/Llama-3.1-70B"]))
    return folder


@pytest.mark.slow
def test_the_70b_of_config_json_alone_as_it_was_counted_apart(llama70):
    """On 64 GPUs: counted before with Transformer Engine's own Python on fake CUDA tensors, by another program."""
    done = check(llama70, "--world-size", "64", "--device", "h100-80", "--json")
    assert done.returncode == 0, done.stderr
    ranks = {rank["name"]: rank for rank in json.loads(done.stdout)["rehearsal"]["ranks"]}
    first, last = ranks["stage 0 (first)"], ranks["stage 3 (last)"]
    for rank in (first, last):
        assert rank["parts"]["weights"] / GIB == pytest.approx(4.23, abs=0.01)
        assert rank["parts"]["gradients"] / GIB == pytest.approx(8.46, abs=0.01)
        assert rank["parts"]["KV cache"] / GIB == pytest.approx(10.0, rel=0.05)
    held = first["phases"]["gradients, optimizer"]["after"] / GIB
    assert held == pytest.approx(29.62, rel=0.01)
    assert first["phases"]["update"]["peak"] / GIB == pytest.approx(41.4, rel=0.05)
    assert last["phases"]["update"]["peak"] / GIB == pytest.approx(35.0, rel=0.05)
    # a gathered embedding of 128,256 x 8,192 in bf16, from 8 ranks, and the same in one piece
    exported = first["phases"]["export"]
    assert (exported["peak"] - exported["before"]) / GIB == pytest.approx(2 * 1.957, rel=0.02)
    assert first["phases"]["save"]["peak"] - first["phases"]["save"]["before"] < 0.1 * GIB
    assert first["loading"] / GIB == pytest.approx(1.957 / 8, rel=0.02)
    assert "rehearsing rank 48 of 64" in done.stderr


@pytest.mark.slow
def test_what_does_not_fit_ends_with_2_and_names_what_would(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen2.5-Math-1.5B"]))
    done = check(tmp_path, "--world-size", "8", "--device", "45", "--json", recipe="qwen25_math_1.5b")
    assert done.returncode == 2, done.stdout + done.stderr
    found = json.loads(done.stdout)["rehearsal"]
    assert not found["fits"]
    assert found["proposals"]
    for proposal in found["proposals"]:
        assert proposal["changes"]
        assert max(rank["needed"] for rank in proposal["ranks"]) <= 45 * GIB
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_rehearsal_counts_what_a_real_run_takes():
    """Every tensor of a real second step, by phase. The process's own memory is for the benchmark to compare."""
    rows = [row for row in compare(next(iter(RUNS))) if row.phase != "process"]
    assert {row.phase for row in rows} == {"held", "rollout", "reference", "update"}
    assert all(row.agrees for row in rows), "\n".join(f"{row} {row.error:+.2%}" for row in rows if not row.agrees)


QWEN, MIXTRAL = "Qwen/Qwen2.5-Math-1.5B", "mistralai/Mixtral-8x7B-v0.1"
SP = "parallel.sequence_parallel=true"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (QWEN, ("parallel.pp=4", "parallel.vpp=2")),
        (QWEN, ("parallel.pp=3", "parallel.vpp=2", "parallel.micro_batch_size=2")),
        (QWEN, ("parallel.tp=2", SP, "parallel.cp=2")),
        (QWEN, ("model.reference=swap", "model.recompute=full", "optimizer.distributed=false")),
        (QWEN, ("precision.dtype=fp8", "precision.fp8_recipe=blockwise")),
        (MIXTRAL, ("parallel.tp=2", SP, "parallel.ep=4", "optimizer.updates_per_rollout=2")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_every_layout_can_be_rehearsed(tmp_path, model, settings):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[model] | {"num_hidden_layers": 8}))
    size = "12" if "parallel.pp=3" in settings else "8"
    several = ("rollout.prompts_per_step=48", "rollout.max_response_tokens=512")
    done = check(
        tmp_path, "--world-size", size, "--device", "1000", "--json", *several, *settings, recipe="qwen25_math_1.5b"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rehearsal"]["fits"]


def test_options_that_make_no_sense_are_refused_before_anything_is_built(llama70):
    wrong = check(llama70, "--world-size", "64", "--device", "a100")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--device='a100': name one of" in wrong.stderr
    unused = check(llama70, "--world-size", "64", "--save-delay", "3")
    assert unused.returncode == 2
    assert "--save-delay has no effect" in unused.stderr
