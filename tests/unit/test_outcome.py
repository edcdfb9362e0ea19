"""How a run ended is read from its folder, with its exit code; no older outcome is taken for a newer one."""

from __future__ import annotations

import json
import time

import pytest
from typer.testing import CliRunner

from megatron_powerflow.checkpoint.first_files import not_ours, remove_first_files
from megatron_powerflow.cli import app
from megatron_powerflow.errors import UserError
from megatron_powerflow.outcome import (
    OUTCOME_NAME,
    outcome_of,
    read_outcome,
    remove_outcome,
    running,
    write_outcome,
)
from megatron_powerflow.parallel.launch import ALONE
from megatron_powerflow.parallel.owner import Owner
from megatron_powerflow.run_end import RunEnd


def told(folder):
    done = CliRunner().invoke(app, ["outcome", str(folder)])
    return done.exit_code, done.stdout


@pytest.mark.parametrize(
    ("code", "name"),
    [(0, "finished"), (75, "requeue"), (2, "user_error"), (130, "interrupted"), (1, "failed"), (137, "failed")],
)
def test_the_command_ends_with_the_runs_own_exit_code(tmp_path, code, name):
    write_outcome(tmp_path, outcome_of(code, 7, "because"))
    assert read_outcome(tmp_path).outcome == name
    exit_code, said = told(tmp_path)
    assert exit_code == code
    assert f"{name} since" in said
    assert said.endswith("7 steps done: because\na start would begin anew\n")


def test_the_last_line_says_where_a_start_goes_on_also_when_the_outcome_is_forgotten(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "latest").write_text("step_000004")
    told_of = CliRunner().invoke(app, ["outcome", "--forget", str(tmp_path)])
    assert (told_of.exit_code, told_of.stdout) == (0, "a start would look for the newest whole checkpoint\n")
    (checkpoints / "step_000004").mkdir()
    write_outcome(tmp_path, outcome_of(1, 7, "because"))
    assert told(tmp_path)[1].endswith("because\na start would continue from step_000004\n")
    told_of = CliRunner().invoke(app, ["outcome", "--forget", str(tmp_path)])
    assert (told_of.exit_code, told_of.stdout) == (0, "a start would continue from step_000004\n")
    assert told(tmp_path)[1].endswith("no start has left its outcome there\na start would continue from step_000004\n")


def test_a_run_that_was_killed_failed_and_one_that_goes_on_has_not_finished(tmp_path):
    write_outcome(tmp_path, running())
    assert told(tmp_path)[0] == 1
    assert "nobody holds the folder: that run was killed" in told(tmp_path)[1]
    with Owner(tmp_path, tmp_path / "run.lock", "powerflow train") as owner:
        owner.take()
        exit_code, said = told(tmp_path)
    assert exit_code == 1
    assert "is held by powerflow train" in said


def test_no_outcome_is_a_failure(tmp_path):
    assert told(tmp_path)[0] == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"a": 1}',
        json.dumps({"outcome": "requeue", "exit_code": "75", "step": 1, "message": "", "time": 1.0}),
        json.dumps({"outcome": "requeue", "exit_code": 7500, "step": 1, "message": "", "time": 1.0}),
        json.dumps({"outcome": "requeue", "exit_code": 75, "step": 1, "message": "", "time": 1e300}),
        json.dumps({"outcome": "requeue", "exit_code": 75, "step": 1, "message": 3, "time": 1.0}),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, text):
    (tmp_path / OUTCOME_NAME).write_text(text)
    with pytest.raises(UserError, match="is no outcome of a run"):
        read_outcome(tmp_path)
    remove_outcome(tmp_path)
    assert not_ours(tmp_path) == [OUTCOME_NAME]
    remove_first_files(tmp_path)
    assert (tmp_path / OUTCOME_NAME).read_text() == text


def test_a_start_takes_the_older_outcome_away_but_not_that_of_a_run_that_goes_on(tmp_path):
    write_outcome(tmp_path, outcome_of(75, 7, ""))
    with Owner(tmp_path, tmp_path / "run.lock", "powerflow train") as owner:
        owner.take()
        RunEnd(ALONE).of_run(tmp_path)
        assert read_outcome(tmp_path).exit_code == 75
    RunEnd(ALONE).of_run(tmp_path)
    assert read_outcome(tmp_path) is None


def test_what_a_start_leaves_before_its_first_step_is_in_nobodys_way(tmp_path):
    write_outcome(tmp_path, running())
    beats = tmp_path / "heartbeats" / ("0123456789abcdef" * 2)
    beats.mkdir(parents=True)
    (beats / "rank_0.json").write_text("{}")
    assert not_ours(tmp_path) == []
    (tmp_path / "heartbeats" / "mine").touch()
    assert not_ours(tmp_path) == ["heartbeats"]
    remove_first_files(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["heartbeats", "heartbeats/mine"]


def test_the_time_is_said_as_people_have_it():
    outcome = outcome_of(0, None, "")
    assert time.strftime("%Y-%m-%d") in outcome.describe()
