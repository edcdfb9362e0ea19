"""`powerflow train` from its start to its end: steps, checkpoints, an export, and a second start that continues."""

from __future__ import annotations

import json

import pytest

from tests.fake_cuda.conftest import GPU
from tests.fake_cuda.runs import RECIPES, SIZES, Case, on_fake_gpu, planned


@pytest.mark.parametrize("recipe", RECIPES[GPU][1:])
def test_a_run_trains_saves_exports_and_continues(tiny_model, tmp_path, monkeypatch, recipe):
    from megatron_powerflow.checkpoint import storage
    from megatron_powerflow.console import make_console
    from megatron_powerflow.train import train

    # What was loaded is compared with what was saved, by sums of bits, and the bits of a weight are no value here.
    monkeypatch.setattr(storage, "loaded_proof", lambda trainable, groups: None)
    monkeypatch.setattr(storage, "_compare", lambda checkpoint, saved, loaded: None)
    model = tiny_model("llama", rope=None, **SIZES)
    for steps in (2, 3):
        plan = planned(Case(recipe, packed=True), model, tmp_path, f"run.num_steps={steps}", "checkpoint.interval=1")
        with on_fake_gpu(0, 1) as (_, _, launch):
            train(plan, launch, make_console())
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["num_skipped"]) for line in lines] == [(0, 0), (1, 0), (2, 0)]
    assert (run / "checkpoints" / "step_000003").is_dir()
    assert (run / "hf_export" / "model.safetensors.index.json").exists() or list(
        (run / "hf_export").glob("*.safetensors")
    )
