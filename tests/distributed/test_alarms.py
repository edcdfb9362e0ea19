"""Each alarm, provoked once by a real run: what it says, what `run.stop_on_alarm` does, what a resumed run says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_powerflow.config_file import load_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.alarm import ALARMS
from megatron_powerflow.metrics.writers import read_metrics
from tests.distributed.megatron_sessions import run_training
from tests.gloo_workers import RankFailed

FAR_TOO_FAST = ["optimizer.lr=0.1", "objective.alpha=1.1"]  # the loss is small at first and does not end at 0
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    """Eight prompts a step, so that the tests on lengths need 18 steps (`length_shift.py`)."""
    model = tiny_model("llama", vocab_size=10, scale=0.05, rope=None, **SIZES)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [3 + i, 4]}) + "\n" for i in range(7)))
    values = {
        "model": {"hf_path": str(model)},
        "precision": {"dtype": "fp32"},
        "prompts": {"path": str(prompts)},
        "rollout": {
            "prompts_per_step": 8,
            "responses_per_prompt": 8,
            "max_prompt_tokens": 4,
            "max_response_tokens": 24,
            "max_concurrent_rows": 64,
        },
        "parallel": {"micro_batch_size": 64},
        "objective": {"log_z": "group"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"interval": 0},
        "evaluation": {"samples": 0},
        "metrics": {"wandb": "off", "curves": False},
        "run": {"output_dir": str(tmp_path / "run"), "export": True, "num_steps": 40},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(values))
    return path


def rung(folder: Path) -> set[str]:
    """The alarms that rang at any step."""
    return {name for name in ALARMS for line in read_metrics(folder) if line[f"alarm_{name}"]}


def state_of(folder: Path) -> str:
    return (folder / "checkpoints" / "latest").read_text().strip()


@pytest.mark.slow
def test_a_diverging_loss_ends_the_run_and_nothing_is_exported(gloo, config, tmp_path):
    out, stop = tmp_path / "run", "run.stop_on_alarm=[loss,loss]"
    (printed,) = gloo.run(1, run_training, config, *FAR_TOO_FAST, stop)
    lines = read_metrics(out)
    assert "alarm loss at step 6: loss rose from" in printed
    assert "the policy has diverged and is not exported" in printed
    assert len(lines) == 6
    assert [line["alarm_loss"] for line in lines] == [line["alarm"] for line in lines] == [0.0] * 5 + [1.0]
    assert state_of(out) == "step_000006"
    assert not (out / "hf_export").exists()

    (again,) = gloo.run(1, run_training, config, *FAR_TOO_FAST, stop)  # it still rings, and still ends the run
    assert "is not exported" in again
    assert read_metrics(out) == lines
    gloo.run(2, run_training, config, *FAR_TOO_FAST, "run.stop_on_alarm=[]", "run.num_steps=8", "parallel.tp=2")
    assert [line["alarm_loss"] for line in read_metrics(out)] == [0.0] * 5 + [1.0] * 3
    assert not (out / "hf_export").exists()


def test_a_policy_that_its_first_updates_make_endless_rings(gloo, config, tmp_path):
    """lr 10: from the second step on every response is one and the same, cut, and the loss is 0."""
    (printed,) = gloo.run(1, run_training, config, "optimizer.lr=10", "run.stop_on_alarm=[length]")
    assert "alarm length at step 7: truncated_fraction rose from" in printed
    assert "the policy has diverged and is not exported" in printed
    assert not (tmp_path / "run" / "hf_export").exists()
    assert len(read_metrics(tmp_path / "run")) == 7
    assert rung(tmp_path / "run") == {"length"}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["objective.alpha=4", "optimizer.lr=1e-2", "run.num_steps=25"], "length"),
        (["objective.preset=tb_traj", "optimizer.lr=1e-3", "run.num_steps=40"], "short"),
    ],
)
def test_lengths_that_move_ring(gloo, config, tmp_path, settings, name):
    (printed,) = gloo.run(1, run_training, config, *settings, "run.stop_on_alarm=true")
    assert f"alarm {name} at step" in printed
    assert 12 < len(read_metrics(tmp_path / "run")) < 40
    assert rung(tmp_path / "run") == {name}
    assert (tmp_path / "run" / "hf_export").is_dir()  # a user may want it; what rings is said beside it


def test_a_sampler_that_agrees_does_not_ring(gloo, config, tmp_path):
    """One that disagrees is refused at the first batch (`test_diverging_runs.py`), and rings at a later one."""
    gloo.run(1, run_training, config, "run.num_steps=2")
    assert rung(tmp_path / "run") == set()


def test_steps_that_keep_nothing_ring_before_they_fail_the_run(gloo, config, tiny_model, tmp_path):
    """One token of 301, never the end: all are cut."""
    model = tiny_model("llama", vocab_size=301, scale=0.05, rope=None, **SIZES)
    out = tmp_path / "run"
    settings = [
        f"model.hf_path={model}",
        "objective.truncated=drop",
        "rollout.max_response_tokens=1",
        "rollout.responses_per_prompt=2",
        "rollout.prompts_per_step=2",
        "parallel.micro_batch_size=4",
    ]
    (printed,) = gloo.run(1, run_training, config, *settings, "run.stop_on_alarm=[nothing_kept]")
    assert "alarm nothing_kept at step 3: no response was kept in 3 steps in a row. Raise rollout.max_resp" in printed
    assert [line["alarm_nothing_kept"] for line in read_metrics(out)] == [0.0, 0.0, 1.0]
    assert "does not become `latest`, because steps are being skipped (3 in a row)" in printed
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000003"]
    with pytest.raises(RankFailed, match=r"5 steps in a row had no response to learn from"):
        gloo.run(1, run_training, config, *settings, f"run.output_dir={tmp_path / 'on'}")
    assert [line["alarm_nothing_kept"] for line in read_metrics(tmp_path / "on")] == [0.0, 0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stop_on_alarm=[nonsense]", r"run.stop_on_alarm=\['nonsense'\]: must be .* \[length, short, loss, "),
        ("run.stop_on_alarm=loss", "run.stop_on_alarm='loss': must be true, false or a list"),
        ("run.stop_on_alarm=[{a: 1}]", "must be true, false or a list"),
    ],
)
def test_names_that_are_no_alarms_are_refused_with_those_that_are(config, override, message):
    with pytest.raises(UserError, match=message) as caught:
        load_config(config, [override])
    assert len(caught.value.violations) == 1


def test_an_alarm_that_would_come_too_late_is_refused(config):
    with pytest.raises(UserError, match="max_skipped_steps=3 fails the run first"):
        load_config(config, ["run.stop_on_alarm=[nothing_kept]", "optimizer.max_skipped_steps=3"])
