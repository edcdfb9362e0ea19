"""Who holds the others up: arithmetic over what ranks say of themselves, and the words for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_powerflow.parallel.verdict import (
    SLOW_FACTOR,
    State,
    late_ranks,
    limit_seconds,
    say_gone,
    say_late,
    say_silent,
    watched_by,
)


def state(rank: int, idle: float, *, waiting: bool = True, step: int | None = 6, phase: str = "update") -> State:
    return State(rank, "node3", 100 + rank, phase, step, idle, waiting, "training/update.py:62 update")


def late(*states: State, world_size: int | None = None) -> list[int]:
    found = late_ranks({each.rank: each for each in states}, world_size or len(states), 300.0)
    return [each.rank for each in found]


def test_nobody_is_late_while_any_rank_gets_on():
    """The main rank writes an export for an hour; the others wait for it."""
    assert late(state(0, 10, waiting=False, phase="export"), state(1, 4000), state(2, 4000)) == []


def test_the_one_that_does_not_wait_is_late():
    assert late(state(0, 310), state(1, 340, waiting=False), state(2, 305)) == [1]


def test_of_several_the_one_that_got_on_longest_ago_comes_first():
    assert late(state(0, 310, waiting=False), state(1, 340, waiting=False), state(2, 305)) == [1, 0]


def test_where_all_wait_the_one_of_an_earlier_step_is_late():
    """As on a GPU, where every rank seems to be in the same call."""
    assert late(state(0, 310), state(1, 305, step=5), state(2, 320)) == [1]
    assert late(state(0, 310), state(1, 305, step=None), state(2, 320)) == [1]


def test_where_none_is_behind_all_are_named():
    assert late(state(0, 310), state(1, 320)) == [1, 0]


def test_a_rank_that_has_said_nothing_or_has_ended_is_not_judged_here():
    assert late(state(0, 310), state(1, 320), world_size=3) == []
    assert late(state(0, 310), replace(state(1, 0), ended=True)) == [0]


def test_phases_that_wait_for_files_may_take_longer():
    assert limit_seconds("update", 300) == 300
    assert limit_seconds("loading", 300) == limit_seconds("checkpoint", 300) == 300 * SLOW_FACTOR
    assert late(state(0, 310, phase="checkpoint"), state(1, 310, phase="checkpoint")) == []
    assert late(state(0, 1300, phase="checkpoint", waiting=False), state(1, 1300, phase="checkpoint")) == [0]


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8, 64, 512])
def test_every_rank_is_watched_by_some_on_other_nodes_and_none_reads_much(world_size):
    watchers = {rank: set() for rank in range(world_size)}
    for rank in range(world_size):
        others = watched_by(rank, world_size)
        assert len(others) <= max(1, world_size.bit_length())
        for other in others:
            watchers[other].add(rank)
    for rank, seen_by in watchers.items():
        assert rank not in seen_by
        assert seen_by
        if world_size > 8:
            assert {watcher // 8 for watcher in seen_by} - {rank // 8}


def test_the_words():
    assert say_late([state(1, 312.4, waiting=False)], 4) == (
        "rank 1 on node3 (process 101) has not got on for 312 s in update of step 7 (training/update.py:62 update), "
        "while the other ranks wait"
    )
    assert say_late([state(1, 320), state(0, 310)], 2) == (
        "no rank has got on for 320 s in update of step 7, and none is behind: rank 1 in training/update.py:62 update; "
        "rank 0 in training/update.py:62 update"
    )
    assert say_gone(state(1, 0, step=None, phase="loading")) == (
        "rank 1 on node3 (process 101) is gone, last seen in loading: it was killed (out of memory? `dmesg` says so) "
        "or crashed"
    )
    assert "for 301 s, last in update of step 7" in say_silent(state(1, 0), 301, stopped=True)
    assert "it is stopped (SIGSTOP), and so it writes no stack" in say_silent(state(1, 0), 301, stopped=True)
    assert "its host or its file system is away" in say_silent(state(1, 0), 301, stopped=False)
