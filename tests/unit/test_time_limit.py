"""A run must stop so early that a step and a save fit, and not earlier than needed."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest

from megatron_powerflow.parallel.slurm_job import end_of_job
from megatron_powerflow.time_limit import LEAST_MARGIN_SECONDS, TimeLimit, needed_seconds, seconds_until_stop

NOW = datetime(2026, 11, 26, 12, tzinfo=timezone(timedelta(hours=2)))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("23h30m", 84600),
        ("90m", 5400),
        ("1d", 86400),
        ("2d3h4m5s", 183845),
        ("5400", 5400),
        ("45s", 45),
        ("2026-11-26T13:30:00+02:00", 5400),
        ("2026-11-26T11:30Z", 5400),
        ("2026-11-26T11:00+02:00", -3600),
        ("", None),
        ("soon", None),
        ("1h 30m", None),
        ("-5", None),
        ("30m1h", None),
        ("1.5h", None),
    ],
)
def test_durations_and_times(text, seconds):
    assert seconds_until_stop(text, NOW) == seconds


def test_a_time_without_a_zone_is_local_time():
    now = datetime(2026, 11, 26, 12)
    assert seconds_until_stop("2026-11-26T12:10", now) == 600


def test_the_run_stops_when_the_longest_step_and_save_would_no_longer_fit():
    limit = TimeLimit(10_000.0, "the test")
    for seconds in (100.0, 300.0, 200.0):
        limit.note_step(seconds)
    limit.note_save(80.0)
    limit.note_save(100.0)
    needed = 300 + 100 + 100  # a quarter more
    assert not limit.is_due(10_000 - needed - 1)
    assert limit.is_due(10_000 - needed + 1)
    assert limit.describe(9_600.0) == (
        "400 s are left of the test, and a step and a save may take 500 s: the run saves and stops"
    )


def test_old_steps_are_forgotten():
    limit = TimeLimit(1000.0, "the test")
    limit.note_step(900.0)  # the first one compiles
    for _ in range(5):
        limit.note_step(10.0)
    assert not limit.is_due(100.0)


def test_before_the_first_save_loading_stands_for_it_and_afterwards_it_does_not():
    limit = TimeLimit(1000.0, "the test", loading_seconds=400.0)
    limit.note_step(100.0)
    assert limit.is_due(1000 - 625 + 1)
    assert not limit.is_due(1000 - 625 - 1)
    limit.note_save(20.0)
    assert not limit.is_due(1000 - 151)


def test_short_steps_leave_the_least_margin():
    assert needed_seconds([0.1], [0.1]) == pytest.approx(0.2 + LEAST_MARGIN_SECONDS)
    assert needed_seconds([], []) == LEAST_MARGIN_SECONDS


def test_without_a_limit_nothing_is_ever_due():
    assert not TimeLimit(None, "").is_due(1e18)


def test_slurms_end_of_a_job():
    shown = "JobId=7 JobName=x\n   RunTime=00:00:01 TimeLimit=1-00:00:00 TimeMin=N/A\n   StartTime=2026-11-26T10:00:00 "
    end = end_of_job(shown + "EndTime=2026-11-27T10:00:00 Deadline=N/A")
    assert end == datetime(2026, 11, 27, 10).timestamp()
    assert end_of_job(shown + "EndTime=Unknown") is None
    assert end_of_job("") is None
    unlimited = shown.replace("1-00:00:00", "UNLIMITED") + "EndTime=2027-11-26T10:00:00"
    assert end_of_job(unlimited) is None
