"""Every second between a run's first start and its last end is in one category, whatever ended the starts."""

from __future__ import annotations

import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.errors import UserError
from megatron_powerflow.journal import append_lines
from megatron_powerflow.metrics.goodput import goodput_of, goodput_without_events, wrong_with_event
from megatron_powerflow.report.goodput_table import (
    goodput_json,
    goodput_lines,
    goodput_sentence,
    goodput_table,
    read_all,
    read_goodput,
)
from tests.report_folders import make_run

STEP = {"rollout": 5.0, "reference": 1.0, "update": 2.0}  # 8 s


class Written:
    """events.jsonl as a run would write it, with a clock of our own. Example: `Written().start(0).step(0, 10)`."""

    def __init__(self, boot: str = "b") -> None:
        self.lines: list[dict] = []
        self.boot, self.moved, self.id = boot, 0.0, 0

    def add(self, event: str, at: float, **values) -> Written:
        clock = {"time": 1.7e9 + at + self.moved, "uptime": 500.0 + at}
        self.lines.append({"event": event, "start": f"s{self.id}", **clock, **values})
        return self

    def start(self, at: float, *, untouched: float | None = None, world_size: int = 2, began: float = 1.0) -> Written:
        self.id += 1
        facts = {"began": began, "untouched": untouched, "boot": self.boot, "world_size": world_size, "device": "cpu"}
        return self.add("start", at + began, **facts)

    def loaded(self, at: float, first_step: int, num_dropped: int = 0) -> Written:
        return self.add("loaded", at, first_step=first_step, num_dropped=num_dropped)

    def step(self, step: int, at: float, **seconds: float) -> Written:
        return self.add("step", at, step=step, seconds=seconds or STEP)

    def saved(self, step: int, at: float, seconds: float = 2.0) -> Written:
        return self.add("saved", at, step=step, seconds={"checkpoint": seconds})

    def end(self, at: float, cause: str = "finished", by: str = "", **seconds: float) -> Written:
        return self.add("end", at, cause=cause, by=by, seconds=seconds)


def a_killed_run() -> Written:
    """Two steps and a save, a third step that is lost, killed 4 s into the fourth; 30 s later it goes on to the end."""
    run = Written().start(0).loaded(11, 0).step(0, 20).step(1, 29).saved(2, 31).step(2, 40)
    run.start(74, untouched=31.0).loaded(85, 2, num_dropped=1).step(2, 94).step(3, 103, evaluation=1.0, **STEP)
    return run.saved(4, 105).end(106, export=0.5)


def test_a_kill_by_hand():
    goodput = goodput_of(a_killed_run().lines)
    assert goodput.seconds == pytest.approx(
        {
            "productive": 4 * 8,  # steps 0, 1, 2 of the second start, 3
            "evaluating": 1,
            "saving": 2 + 2 + 0.5,
            "loading": 11 + 11,
            "lost": 9 + 4,  # step 2 of the first start with what lay between, and the 4 s behind its line
            "waiting": 30,  # killed at 44, begun at 74
            "other": 1 + 1 + 1 + 0.5,
        }
    )
    assert goodput.wall_seconds == pytest.approx(106)
    assert goodput.effective_share == pytest.approx(32 / 106)
    assert (goodput.num_starts, goodput.num_steps_done, goodput.num_steps_lost) == (2, 4, 1)
    assert goodput.interruptions == {"killed": 1}
    assert goodput.process_hours["productive"] == pytest.approx(2 * 32 / 3600)
    assert goodput.process_hours["waiting"] == 0
    assert goodput.notes == ()


def test_what_the_first_kill_cost_stays_lost_when_a_later_start_comes_further():
    """No checkpoint before the first kill; the second start saves, and the third goes on from there."""
    run = Written().start(0).loaded(11, 0).step(0, 20).step(1, 29)
    run.start(40, untouched=11.0).loaded(51, 0, num_dropped=2).step(0, 60).step(1, 69).saved(2, 71)
    run.start(80, untouched=9.0).loaded(91, 2).step(2, 100).end(100)
    goodput = goodput_of(run.lines)
    assert goodput.seconds["productive"] == pytest.approx(3 * 8)
    assert goodput.seconds["lost"] >= 18  # both steps of the first start
    assert (goodput.num_steps_done, goodput.num_steps_lost) == (3, 2)


def test_a_clock_that_was_moved_does_no_harm_and_is_said():
    moved = Written().start(0).loaded(11, 0).step(0, 20)
    moved.moved = -3600.0
    moved.step(1, 29).saved(2, 31).step(2, 40)
    moved.start(74, untouched=31.0).loaded(85, 2, num_dropped=1).step(2, 94).step(3, 103, evaluation=1.0, **STEP)
    moved.saved(4, 105).end(106, export=0.5)
    goodput = goodput_of(moved.lines)
    assert goodput.seconds == pytest.approx(goodput_of(a_killed_run().lines).seconds)
    assert "the clock was moved by -3600 s during start 1" in goodput.notes[0]


def test_a_clock_that_is_behind_on_another_machine_counts_no_waiting_and_is_said():
    run = Written("one").start(0).loaded(5, 0).step(0, 14).saved(1, 16).end(16, "requeue", "SIGUSR1")
    run.boot, run.moved = "two", -100.0
    run.start(40).loaded(45, 1).step(1, 54).saved(2, 56).end(56)
    goodput = goodput_of(run.lines)
    assert goodput.seconds["waiting"] == 0
    assert goodput.wall_seconds == pytest.approx(16 + 16)
    assert "start 2 began before start 1 ended" in goodput.notes[0]
    run.boot, run.moved = "one", 0.0


def test_another_machine_is_measured_by_the_clock():
    run = Written("one").start(0).loaded(5, 0).step(0, 14).saved(1, 16).end(16, "requeue", "SIGUSR1")
    run.boot = "two"
    run.start(40).loaded(45, 1).step(1, 54).saved(2, 56).end(56)
    for line in run.lines[5:]:
        line["uptime"] += 77.0
    goodput = goodput_of(run.lines)
    assert goodput.seconds["waiting"] == pytest.approx(24)
    assert goodput.interruptions == {"requeue: SIGUSR1": 1}
    assert goodput.num_steps_lost == 0


def test_work_behind_the_last_checkpoint_is_lost_where_no_start_follows():
    run = Written().start(0).loaded(5, 0).step(0, 14).saved(1, 16).step(1, 25).step(2, 34)
    killed = goodput_of(run.lines, last_touched=1.7e9 + 37)
    assert (killed.num_steps_done, killed.num_steps_lost) == (1, 2)
    assert killed.seconds["lost"] == pytest.approx(9 + 9 + 3)
    assert killed.wall_seconds == pytest.approx(37)
    assert killed.interruptions == {"killed": 1}
    running = goodput_of(run.lines, last_touched=1.7e9 + 37, running=True)
    assert (running.num_steps_done, running.num_steps_lost, running.interruptions) == (3, 0, {})
    assert running.seconds["lost"] == 0
    failed = goodput_of(run.end(36, "bug", "KeyError", rollout=2.0).lines)
    assert (failed.num_steps_lost, failed.interruptions) == (2, {"bug: KeyError": 1})
    assert failed.seconds["lost"] == pytest.approx(9 + 9 + 2)


def test_a_start_that_died_while_loading_loaded_for_as_long_as_it_lived():
    run = Written().start(0).start(50, untouched=40.0).loaded(58, 0).step(0, 67).saved(1, 69).end(69)
    goodput = goodput_of(run.lines)  # touched last at 11
    assert goodput.seconds["loading"] == pytest.approx(11 + 8)
    assert goodput.seconds["waiting"] == pytest.approx(39)
    assert goodput.wall_seconds == pytest.approx(69)


def test_steps_are_lost_as_often_as_they_are_done_in_vain():
    """As metrics.jsonl counts them: its line of a step may be there when a kill forestalls the event."""
    run = Written().start(0).loaded(5, 0).step(0, 14).saved(1, 16).step(1, 25)
    run.start(30, untouched=3.0).loaded(35, 1, num_dropped=2).step(1, 44)
    run.start(50, untouched=5.0).loaded(55, 1, num_dropped=1).step(1, 64).saved(2, 66).end(66)
    goodput = goodput_of(run.lines)
    assert (goodput.num_steps_done, goodput.num_steps_lost) == (2, 3)
    for line in run.lines:
        line.pop("num_dropped", None)
    assert goodput_of(run.lines).num_steps_lost == 2


def test_a_run_that_went_back_to_an_earlier_checkpoint_lost_saved_steps():
    run = Written().start(0).loaded(5, 0).step(0, 14).saved(1, 16).step(1, 25).saved(2, 27).end(27)
    run.start(30).loaded(35, 1, num_dropped=1).step(1, 44).saved(2, 46).end(46)
    goodput = goodput_of(run.lines)
    assert (goodput.num_steps_done, goodput.num_steps_lost) == (2, 1)
    assert goodput.seconds["lost"] == pytest.approx(9)
    assert goodput.seconds["saving"] == pytest.approx(6)


EVENTS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 9)), st.tuples(st.just("saved"), st.integers(0, 9)), st.just(("end", 0))
)


@given(st.lists(st.lists(EVENTS, max_size=6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_the_categories_are_the_wall_clock_whatever_is_written(starts, r):
    run, at = Written(), 0.0
    for events in starts:
        run.start(at, untouched=r.choice([None, 0.0, 1.0, 1e6]))
        at += 1  # when its line is written
        if r.random() < 0.8:
            run.loaded(at := at + 2, r.randrange(9), r.randrange(3))
        for event, step in events:
            at += r.random() * 10
            seconds = {"rollout": r.random() * 20, "checkpoint": r.random(), "odd": 1.0}
            run.add(event, at, step=step, cause=r.choice(["finished", "bug", 3]), seconds=r.choice([seconds, None, []]))
        at += 5
    goodput = goodput_of(run.lines, running=r.random() < 0.3)
    last = run.lines[-1]["uptime"] - 500
    assert goodput.wall_seconds == pytest.approx(max(last, 0), abs=1e-6)
    assert all(value >= 0 for value in goodput.seconds.values())
    assert goodput.num_steps_done >= 0
    assert goodput.num_steps_lost >= 0


@pytest.mark.parametrize(
    "change",
    [
        {"event": 3},
        {"start": None},
        {"time": "1"},
        {"uptime": math.nan},
        {"uptime": -1},
        {"uptime": 10**400},
        {"time": True},
        {"step": -1},
        {"step": 1.0},
        {"step": None},
    ],
)
def test_a_line_that_is_none_is_named(change):
    line = {"event": "step", "start": "s", "time": 1.0, "uptime": 1.0, "step": 0}
    assert wrong_with_event(line) is None
    assert wrong_with_event(line | change)


def test_events_of_a_later_version_are_no_damage():
    assert wrong_with_event({"event": "rescaled", "start": "s", "time": 1.0, "uptime": 1.0}) is None
    run = Written().start(0).loaded(5, 0).add("rescaled", 7).step(0, 15).saved(1, 17).end(17)
    assert goodput_of(run.lines).wall_seconds == pytest.approx(17)


def test_a_run_of_before_events_says_what_cannot_be_known(tmp_path):
    lines = [
        {"step": step, "rollout_seconds": 2.0, "update_seconds": 1.0, "checkpoint_seconds": 0.5} for step in (0, 1)
    ]
    append_lines(tmp_path / "metrics.jsonl", lines)
    append_lines(tmp_path / "launches.jsonl", [{"first_step": 0}, {"first_step": 1}])
    goodput = read_goodput(tmp_path, [])
    assert goodput.seconds == {
        **{"productive": 6.0, "evaluating": 0.0, "saving": 1.0},
        **dict.fromkeys(("loading", "lost", "waiting", "other")),
    }
    assert (goodput.num_starts, goodput.num_steps_done, goodput.num_steps_lost, goodput.wall_seconds) == (
        2,
        2,
        None,
        None,
    )
    assert "cannot be known" in goodput.notes[0]
    assert goodput_lines([("run", goodput)]) == []
    assert goodput_without_events([{"step": 0, "rollout_seconds": math.nan}], 0).seconds["productive"] == 0


def test_what_is_shown_and_what_programs_get(tmp_path):
    from megatron_powerflow.console import make_console

    run = tmp_path / "run"
    run.mkdir()
    append_lines(run / "events.jsonl", a_killed_run().lines)
    with (run / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "st')
    notes: list[str] = []
    goodput = read_all({run: False}, notes)[run]
    assert notes == [f"{run}/events.jsonl:13: torn: it has no end; this line is left out, and no other"]
    sentence = goodput_sentence("run", goodput)
    assert sentence == "run: 2 starts, 4 steps, effective 30.2% of 2 min; 1 steps lost; interrupted by: killed 1"
    console = make_console(io.StringIO(), width=120)
    with console.capture() as captured:
        console.print(goodput_table(run, goodput))
    assert "productive" in captured.get()
    assert "process-hours" in captured.get()
    values = json.loads(json.dumps(goodput_json(goodput), allow_nan=False))
    assert math.fsum(values["seconds"].values()) == pytest.approx(values["wall_seconds"])
    assert values["interruptions"] == {"killed": 1}
    with pytest.raises(UserError) as caught:
        read_all({tmp_path / "none": False, tmp_path: False}, [])
    assert "no such folder" in caught.value.violations[0]
    assert "no events.jsonl" in caught.value.violations[1]


def test_a_report_has_a_line_of_where_the_time_went(tmp_path):
    from megatron_powerflow.report.page import build_report

    run = make_run(tmp_path / "run", seed=0, evaluated=False, last=25)
    append_lines(run / "events.jsonl", a_killed_run().lines)
    with (run / "events.jsonl").open("ab") as file:
        file.write(b"\0" * 9)
    page = build_report([run], tmp_path / "out", "powerflow report ...").read_text(encoding="utf-8")
    assert "2 starts, 4 steps, effective 30.2% of 2 min; 1 steps lost; interrupted by: killed 1" in page
    assert "events.jsonl:13: zeros, as a power cut leaves them" in page
