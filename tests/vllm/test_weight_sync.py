"""After every update the servers have the trainer's weights, and a server that has not is found by name."""

from __future__ import annotations

import pytest

GAP = 1e-3  # nats per token, the bound of fp32


@pytest.fixture(scope="module")
def served(shared_job):
    shared_job.serve(faulty=True)
    return shared_job


@pytest.fixture(autouse=True)
def healthy(served):
    served.fault_file.write_text("")
    yield
    served.fault_file.write_text("")


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("transport", ["folder", "changes", "stream"])
def test_ten_steps_with_a_proof_after_each(served, tmp_path, layout, transport):
    run = tmp_path / "run"
    sizes = {f"parallel.{name}": size for name, size in layout.items()}
    changes = {"rollout.vllm.urls": [served.url()], **NO_START, "run.num_steps": 10, "run.output_dir": str(run)}
    found = served.train(num_processes=2, **changes, **sizes, **{"rollout.vllm.transport": transport})
    assert found.returncode == 0, found.stdout + found.stderr
    from megatron_powerflow.journal import read_journal

    lines = read_journal(run / "metrics.jsonl").lines
    assert len(lines) == 10
    assert all(line["sync_gap_mean"] < GAP and line["sync_gap_max"] < GAP for line in lines), lines
    assert all(line["sampler_gap_mean"] < GAP for line in lines)
    assert all(line["num_servers"] == 1 for line in lines)
    print("gaps", [line["sync_gap_mean"] for line in lines], "share", [line["sync_share"] for line in lines])
    if transport == "changes":
        # at this rate nearly every number moves, in its lower bytes: two versions of changes are more than all of it
        assert min(line["sync_share"] for line in lines) < 0.9
    if transport == "stream":
        assert all(line["sync_share"] == 1 for line in lines)
        assert not (run / "weights").exists(), "no weights are on a disk"


NO_START = {f"rollout.vllm.{key}": None for key in ("start", "python", "arguments", "port")}
# fault -> words that the error has
FAULTS = {
    "tied_head": ["layers that compute with something else than they were sent: lm_head.weight (tied)"],
    "stale": ["with other numbers than were sent:", "model.layers.0.mlp.down_proj.weight"],
    "dropped": ["never loaded: model.layers.1.self_attn.o_proj.weight"],
    "transposed": ["with other numbers than were sent:", "model.layers.1.self_attn.o_proj.weight"],
}


@pytest.mark.parametrize(
    ("fault", "transport"), [*((fault, "folder") for fault in FAULTS), ("tied_head", "stream"), ("dropped", "stream")]
)
def test_a_server_with_other_weights_stops_the_run_and_the_fault_is_named(served, tmp_path, fault, transport):
    """Before each fault the server gets weights that have been trained, so that those of the base are news to it."""
    common = {"rollout.vllm.urls": [served.url()], **NO_START, "run.num_steps": 2, "rollout.vllm.transport": transport}
    assert served.train(**common, **{"run.output_dir": str(tmp_path / "before")}).returncode == 0
    served.fault_file.write_text(fault)
    run = tmp_path / "run"
    found = served.train(**common, **{"run.output_dir": str(run)})
    text = " ".join((found.stdout + found.stderr).split())
    assert found.returncode == 2, text
    assert f"vLLM server {served.url()} does not have the weights of step 0 " in text, text
    assert all(word in text for word in FAULTS[fault]), text
    assert "Traceback" not in text
    assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text(), "nothing was trained"
