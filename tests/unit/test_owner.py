"""The lock of a folder: one owner at a time, whoever starts at once; a dead owner is noticed, a living one stays.

Real processes. Another host is one whose name stands in the lock.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel import owner as module
from megatron_powerflow.parallel.owner import STALE_SECONDS, Owner, held_by_another, this_process

HOLD = """
import sys, time
from pathlib import Path
from megatron_powerflow.parallel.owner import Owner
run = Path(sys.argv[1])
Owner(run, run / "run.lock", "powerflow train").take()
print("held", flush=True)
time.sleep(600)
"""


def owner_of(run: Path) -> Owner:
    return Owner(run, run / "run.lock", "powerflow train")


@pytest.fixture
def killed(tmp_path) -> Path:
    """A folder whose lock was left by a process that is no more."""
    run = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on {socket.gethostname()}"):
        owner_of(run).take()
    process.kill()
    process.wait()
    process.stdout.close()
    return run


def rewrite(run: Path, **changes) -> None:
    path = run / "run.lock"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def age(run: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(run / "run.lock", (then, then))


def test_a_held_folder_is_refused_with_who_since_when_and_what_to_do(tmp_path):
    run = tmp_path / "runs" / "a"
    with owner_of(run) as first:
        first.take()
        first.take()  # its own is no other's
        with pytest.raises(UserError) as caught:
            owner_of(run).take()
        (text,) = caught.value.violations
        assert text.startswith(f"{run}: is held by powerflow train (process {os.getpid()} on {socket.gethostname()}")
        assert f") since {time.strftime('%Y-')}" in text
        assert "wait for it to end, stop it, or write elsewhere" in text
        assert held_by_another(run, run / "run.lock") == text
        first.confirm()
        assert [path.name for path in run.iterdir()] == ["run.lock"]
    assert not (tmp_path / "runs").exists()  # what it made and left empty
    assert held_by_another(run, run / "run.lock") is None


def test_folders_that_were_there_or_hold_something_stay(tmp_path):
    with owner_of(tmp_path) as owner:
        owner.take()
    assert tmp_path.is_dir()
    with owner_of(tmp_path / "new") as owner:
        owner.take()
        (tmp_path / "new" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["config.yaml"]


def test_after_a_kill_the_same_host_sees_at_once_that_the_owner_is_gone(killed):
    assert held_by_another(killed, killed / "run.lock") is None
    with owner_of(killed) as owner:
        owner.take()
        owner.confirm()
        assert [path.name for path in killed.iterdir()] == ["run.lock"]
    assert not [*killed.iterdir()]


def test_a_process_that_has_ended_and_was_not_waited_for_is_gone(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    process.send_signal(signal.SIGKILL)
    while module._process_start(process.pid) != -1:
        time.sleep(0.01)
    try:
        owner_of(tmp_path).take()
    finally:
        process.wait()
        process.stdout.close()


def test_a_later_process_with_its_number_is_not_the_owner(killed):
    rewrite(killed, pid=os.getpid(), process_start=1)
    owner_of(killed).take()


def test_another_host_is_believed_until_its_lock_has_grown_old(killed):
    rewrite(killed, host="node17")
    age(killed, STALE_SECONDS - 30)
    with pytest.raises(UserError) as caught:
        owner_of(killed).take()
    assert "on node17" in str(caught.value)
    assert "has not been touched for 300 s: a living one touches it every 20 s" in str(caught.value)
    assert held_by_another(killed, killed / "run.lock") == str(caught.value)
    age(killed, STALE_SECONDS + 5)
    assert held_by_another(killed, killed / "run.lock") is None
    owner_of(killed).take()


@pytest.mark.parametrize("where", ["boot", "pid_space"])
def test_numbers_of_another_start_or_container_are_not_looked_up_here(killed, where):
    """Its process 12 is not our process 12: only the heartbeat says whether it lives."""
    rewrite(killed, **{where: "another"})
    with pytest.raises(UserError, match="is held by"):
        owner_of(killed).take()


def test_the_same_job_started_again_knows_that_its_first_start_is_gone(killed, monkeypatch):
    rewrite(killed, host="node17", job="4711", restarts=0)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with pytest.raises(UserError, match="job 4711"):  # two steps of one job
        owner_of(killed).take()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert held_by_another(killed, killed / "run.lock") is None
    with owner_of(killed) as owner:
        owner.take()
        assert json.loads((killed / "run.lock").read_text())["restarts"] == 1


def test_a_living_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    with owner_of(tmp_path) as owner:
        owner.take()
        age(tmp_path, 1000)
        deadline = time.monotonic() + 20
        while time.time() - (tmp_path / "run.lock").stat().st_mtime > 100:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_an_owner_that_was_taken_for_dead_notices_and_takes_nothing_back(tmp_path):
    slept, second = owner_of(tmp_path), owner_of(tmp_path)
    slept.take()
    rewrite(tmp_path, host="node17")  # it is on another host than the second, which sees only an old lock
    slept._mine = module._read(tmp_path / "run.lock")
    age(tmp_path, STALE_SECONDS + 5)
    second.take()
    with pytest.raises(UserError, match="was taken over"):
        slept.confirm()
    slept.release()
    second.confirm()
    second.release()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "run.lock")
    with pytest.raises(UserError, match=r"run\.lock is in the way and no lock of ours; move it away"):
        owner_of(tmp_path).take()


@pytest.mark.parametrize("content", ["version = 1\n", "[1]", "null", "{}", '{"packages": []}', "[" * 100_000, "\0"])
def test_a_file_of_somebody_elses_by_that_name_is_refused_and_stays_however_old(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    for seconds in (0, STALE_SECONDS + 5, 10**7):
        age(tmp_path, seconds)
        with pytest.raises(UserError, match=r"run\.lock is in the way and no lock of ours; move it away"):
            owner_of(tmp_path).take()
        assert "no lock of ours" in module.held_by_another(tmp_path, tmp_path / "run.lock")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.lock": content}


@pytest.mark.parametrize("content", ["", "{", '{"token": "../x"}', '{"token": "abc", "host"'])
def test_a_lock_that_says_nothing_counts_until_it_is_old(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with pytest.raises(UserError, match="a host that its lock does not name"):
        owner_of(tmp_path).take()
    age(tmp_path, STALE_SECONDS + 5)
    owner_of(tmp_path).take()


def test_a_successor_that_was_killed_half_way_is_succeeded(killed):
    """It had linked its claim and not yet given it its name."""
    first = module._read(killed / "run.lock")
    dead = json.loads((killed / "run.lock").read_text()) | {"token": "b" * 32}
    (killed / f"run.lock.after-{first.token}").write_text(json.dumps(dead))
    (killed / f"run.lock.new-{'b' * 32}").write_text(json.dumps(dead))
    with owner_of(killed) as owner:
        owner.take()
        assert [path.name for path in killed.iterdir()] == ["run.lock"]


def test_without_hard_links_files_are_made_exclusively(killed, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with owner_of(killed) as owner:
        owner.take()
        with pytest.raises(UserError, match="is held by"):
            owner_of(killed).take()


def compete(run: Path, start, log: Path, num_rounds: int) -> None:
    """Take and give free, again and again; note when it was held."""
    start.wait()
    for _ in range(num_rounds):
        owner = owner_of(run)
        try:
            owner.take()
        except UserError:
            continue
        begun = time.monotonic_ns()
        time.sleep(0.0005)
        owner.confirm()
        ended = time.monotonic_ns()
        with log.open("a") as file:
            file.write(f"{begun} {ended}\n")
        if os.getpid() % 3 == 0:  # dies as the owner: the next one has a dead process to succeed
            os._exit(0)
        owner.release()


@pytest.mark.slow
def test_of_many_that_start_at_once_one_at_a_time_holds_the_folder(tmp_path):
    """16 processes, some of which die as owners: no two held it at the same time."""
    context = multiprocessing.get_context("fork")
    run, log = tmp_path / "run", tmp_path / "log"
    for _ in range(3):
        start = context.Event()
        processes = [context.Process(target=compete, args=(run, start, log, 60)) for _ in range(16)]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join()
            assert process.exitcode == 0
    times = sorted(tuple(map(int, line.split())) for line in log.read_text().splitlines())
    assert len(times) > 30
    assert all(ended < begun for (_, ended), (begun, _) in pairwise(times))


def take_once(run: Path, start, results, number: int) -> None:
    start.wait()
    try:
        owner_of(run).take()
        results[number] = 1
    except UserError:
        results[number] = 2
    deadline = time.monotonic() + 60
    while 0 in results[:] and time.monotonic() < deadline:  # alive until all have tried
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("stale", [False, True])
def test_exactly_one_of_many_takes_a_free_folder_or_one_of_the_dead(tmp_path, killed, stale):
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        run = tmp_path / f"run{attempt}"
        if stale:
            run.mkdir()
            (run / "run.lock").write_bytes((killed / "run.lock").read_bytes())
        start, results = context.Event(), context.Array("i", 24)
        processes = [context.Process(target=take_once, args=(run, start, results, n)) for n in range(24)]
        for process in processes:
            process.start()
        start.set()
        for process in processes:
            process.join()
        assert sorted(results) == [1] + [2] * 23
        assert [path.name for path in run.iterdir()] == ["run.lock"]


def test_what_a_lock_says_comes_back_whole(tmp_path):
    mine = this_process("powerflow train")
    assert mine.process_start == module._process_start(os.getpid()) > 0
    assert mine.job is None or mine.job.isdecimal()
