"""Ranks that hear of each other by files: real processes that are killed, stopped, or stuck."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_powerflow.parallel.pulse import Pulse
from megatron_powerflow.parallel.verdict import State
from megatron_powerflow.parallel.watch import WHOLE, Failure, Watch

RANK = """
import sys, threading, time
from pathlib import Path
from megatron_powerflow.parallel.pulse import Pulse
from megatron_powerflow.parallel.watch import Watch

pulse = Pulse()
pulse.phase, pulse.step = "update", 6


def stuck_here():
    print("ready", flush=True)
    threading.Event().wait()


with Watch(Path(sys.argv[1]), 1, 2, pulse, hang_seconds=float(sys.argv[2]), failed=lambda failure: None) as watch:
    if sys.argv[3] == "stuck":
        stuck_here()
    print("ready", flush=True)
    while sys.stdin.read(1):
        pulse.beat()
"""


class Other:
    """Rank 1 of two, in a process of its own, which gets on at each byte that it is sent."""

    def __init__(self, folder: Path, hang_seconds: float, what: str = "beats") -> None:
        command = [sys.executable, "-c", RANK, str(folder), str(hang_seconds), what]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def other(tmp_path):
    made: list[Other] = []

    def make(hang_seconds: float, what: str = "beats") -> Other:
        made.append(Other(tmp_path, hang_seconds, what))
        return made[-1]

    yield make
    for each in made:
        each.close()


def watching(folder: Path, found: list, hang_seconds: float) -> tuple[Watch, Pulse]:
    pulse = Pulse()
    pulse.phase, pulse.step = "update", 6
    return Watch(folder, 0, 2, pulse, hang_seconds=hang_seconds, failed=found.append), pulse


def wait_for(found: list, seconds: float, pulse: Pulse | None = None) -> Failure:
    deadline = time.monotonic() + seconds
    while not found:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        if pulse is not None:
            pulse.beat()
    return found[0]


def test_a_rank_that_is_killed_is_named_in_seconds(other, tmp_path):
    found: list[Failure] = []
    killed = other(1000)
    watch, _ = watching(tmp_path, found, 20)
    with watch:
        killed.process.kill()
        killed.process.wait()
        failure = wait_for(found, 60)
    assert (failure.rank, failure.exit_code, failure.step) == (0, 1, 6)
    assert f"(process {killed.process.pid}) is gone, last seen in update of step 7" in failure.text


def test_a_rank_that_is_stopped_is_named_and_ended(other, tmp_path):
    found: list[Failure] = []
    stopped = other(3)
    watch, pulse = watching(tmp_path, found, 3)
    with watch:
        time.sleep(1)
        stopped.process.send_signal(signal.SIGSTOP)
        failure = wait_for(found, 90, pulse)
        assert stopped.process.wait(timeout=60) == -signal.SIGKILL  # it would outlive the run
    assert f"(process {stopped.process.pid}) has not been heard of for" in failure.text
    assert "it is stopped (SIGSTOP), and so it writes no stack" in failure.text


def test_a_stack_is_read_when_it_is_whole(tmp_path):
    """faulthandler writes it line by line, and its rank may lose the processor in between."""
    watch, _ = watching(tmp_path, [], 20)
    theirs = "Thread 0x1 (most recent call first):\n  File a.py, line 1 in beat\n\n"
    main = "Thread 0x2 (most recent call first):\n  File b.py, line 2 in wait\n  File c.py, line 3 in planted\n"

    def write() -> None:
        with (tmp_path / "rank_1.stack").open("w") as file:
            for line in (theirs + main + WHOLE).splitlines(keepends=True):
                time.sleep(0.15)
                file.write(line)
                file.flush()

    writer = threading.Thread(target=write)
    writer.start()
    said = watch._stack_of(State(1, "n2", 7, "update", 6, 30.0, False, ""))
    writer.join()
    assert said.splitlines()[1:] == main.splitlines()


def test_a_rank_that_hangs_is_named_with_its_stack(other, tmp_path):
    """Neither gets on; this one waits, as if in a collective, the other one does not."""
    found: list[Failure] = []
    heard = threading.Event()
    stuck = other(2, "stuck")
    pulse = Pulse()
    pulse.phase, pulse.step = "update", 6

    def failed(failure: Failure) -> None:
        found.append(failure)
        heard.set()

    watch = Watch(tmp_path, 0, 2, pulse, hang_seconds=2, failed=failed)
    pulse.is_waiting = lambda: True
    with watch:
        assert heard.wait(timeout=120)  # at one place of the program
    (failure,) = found
    text = failure.text
    assert f"rank 1 on {watch._me.host} (process {stuck.process.pid}) has not got on for" in text
    assert "in update of step 7" in text
    assert "in stuck_here" in text


def test_the_first_claim_holds(tmp_path):
    first, _ = watching(tmp_path, [], 1000)
    second = Watch(tmp_path, 1, 2, Pulse(), hang_seconds=1000, failed=lambda _: None)
    mine, theirs = Failure(0, 2, None, "mine"), Failure(1, 1, 3, "theirs")
    assert second.failure() is None
    assert first.claim(mine) == mine
    assert second.claim(theirs) == mine
    assert second.failure() == mine


def test_a_claim_of_another_rank_is_heard(other, tmp_path):
    found: list[Failure] = []
    other(1000)
    watch, _ = watching(tmp_path, found, 10)
    theirs = Failure(1, 2, None, "error: mend it")
    with watch:
        Watch(tmp_path, 1, 2, Pulse(), hang_seconds=1000, failed=lambda _: None).claim(theirs)
        assert wait_for(found, 60) == theirs


def test_a_rank_that_ended_well_is_not_missed(other, tmp_path):
    found: list[Failure] = []
    ended = other(2)
    watch, pulse = watching(tmp_path, found, 2)
    with watch:
        ended.process.communicate(timeout=60)
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            pulse.beat()
            time.sleep(0.1)
    assert found == []


def test_damaged_files_of_others_are_no_end_of_the_watch(tmp_path):
    (tmp_path / "failure.json").write_text('{"rank": ')
    (tmp_path / "rank_1.json").write_text('{"number": 1, "state": {"rank": 1}, "process": []}')
    watch, _ = watching(tmp_path, [], 1000)
    assert watch.failure() is None
    assert watch.wait_for_another(0.0) is None


def test_what_gets_a_rank_on():
    pulse = Pulse()

    def look() -> float:  # always at the same place of the program
        return pulse.idle_seconds()

    pulse.phase = "update"
    times = []
    for act in (None, None, pulse.beat, None):
        if act:
            act()
        time.sleep(0.2)
        times.append(look())
    assert times[0] == 0.0
    assert times[1] >= 0.15
    assert times[2] == 0.0  # a pass through the model
    assert times[3] >= 0.15
    with pulse.during("checkpoint"):
        assert look() == 0.0  # another phase, another place
    assert pulse.seconds["checkpoint"] >= 0.0


def test_a_phase_that_raises_stays_the_one_that_failed():
    pulse = Pulse()
    pulse.step = 3
    with pytest.raises(ValueError, match="x"), pulse.during("update"):
        raise ValueError("x")
    assert pulse.describe() == "update of step 4"


def test_a_child_that_computes_gets_a_saving_rank_on():
    """Megatron's writers are processes of their own; the main thread waits for them."""
    pulse = Pulse()
    work = "while True: pass"
    with pulse.during("checkpoint"), subprocess.Popen([sys.executable, "-c", work]) as child:
        before, after = pulse._work()[0], 0.0
        deadline = time.monotonic() + 120
        while after < before + 0.5 and time.monotonic() < deadline:
            time.sleep(1)  # the main thread itself computes next to nothing
            after = pulse._work()[0]
        child.kill()
    assert after >= before + 0.5
