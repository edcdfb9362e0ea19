"""What a run needs beside the model is said before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_powerflow.config_file import parse_config
from megatron_powerflow.training.resources import num_checkpoints, resource_violations

HUGE = 10**15  # parameters: no disk holds one checkpoint


def config(folder, *overrides):
    values = {"model": {"hf_path": "m"}, "prompts": {"path": "p"}, "run": {"output_dir": str(folder / "run")}}
    return parse_config(values, ["run.num_steps=10", *overrides])


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        (["checkpoint.interval=0"], 1),
        (["checkpoint.interval=3", "checkpoint.keep=null"], 4),
        (["checkpoint.interval=1", "checkpoint.keep=2"], 3),
        (["checkpoint.interval=10", "checkpoint.keep=2"], 1),
    ],
)
def test_how_many_checkpoints_stand_at_one_time(tmp_path, settings, number):
    assert num_checkpoints(config(tmp_path, *settings)) == number


def test_a_disk_that_is_too_small_is_said_with_the_sizes(tmp_path):
    (violation,) = resource_violations(config(tmp_path, "checkpoint.interval=1", "checkpoint.keep=2"), HUGE)
    assert "3 checkpoint(s) and the export take 40,978,193.3 GiB" in violation
    assert "are free there" in violation
    assert resource_violations(config(tmp_path), 1000) == []
    assert resource_violations(config(tmp_path), None) == []


def test_the_weights_for_servers_take_room_too(tmp_path):
    served = ("rollout.engine=vllm", "rollout.vllm.urls=[http://127.0.0.1:8200]")
    (here,) = resource_violations(config(tmp_path, *served), HUGE)
    assert "and the weights for the servers take" in here
    elsewhere = Path("/dev/shm")
    if elsewhere.is_dir() and elsewhere.stat().st_dev != tmp_path.stat().st_dev:
        weights, run = resource_violations(config(tmp_path, *served, f"rollout.vllm.weights={elsewhere}"), HUGE)
        assert weights.startswith("rollout.vllm.weights='/dev/shm': two versions of the weights take")
        assert "weights for the servers" not in run
    (streamed,) = resource_violations(config(tmp_path, *served, "rollout.vllm.transport=stream"), HUGE)
    assert "weights for the servers" not in streamed
    assert resource_violations(config(tmp_path, *served), 1000) == []


def test_a_limit_of_time_that_is_over_is_refused(tmp_path):
    (violation,) = resource_violations(config(tmp_path, "run.stop_before=2020-01-01T00:00"), None)
    assert violation.startswith("run.stop_before=2020-01-01T00:00 is over; name a later time")
    for later in ("2999-01-01T00:00", "23h30m", "5400"):
        assert resource_violations(config(tmp_path, f"run.stop_before={later}"), None) == []


def test_checkpoints_that_are_there_already_are_not_counted_again(tmp_path):
    for step in (3, 4):
        (tmp_path / "run" / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    (violation,) = resource_violations(config(tmp_path, "checkpoint.interval=1", "checkpoint.keep=2"), HUGE)
    assert "1 checkpoint(s) and the export" in violation


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    (violation,) = resource_violations(config(tmp_path, "run.output_dir=/proc/run"), 1000)
    assert "/proc" in violation
