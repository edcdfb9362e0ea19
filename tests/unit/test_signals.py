"""Which signals end a process at once, and which wait for the end of a step: real signals to a real process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_powerflow.children import LOOK_SECONDS
from megatron_powerflow.signals import ONE_SECONDS, Signals


def heard(*, in_steps: bool) -> tuple[Signals, list, list]:
    leave, noted = [], []
    signals = Signals(leave.append, noted.append)
    if in_steps:
        signals.begin_steps()
    return signals, leave, noted


def test_while_loading_one_signal_is_enough():
    signals, leave, noted = heard(in_steps=False)
    signals.hear(signal.SIGTERM, 0.0)
    assert (leave, noted, signals.asked) == ([signal.SIGTERM], [], None)


def test_during_steps_the_first_is_for_the_end_of_the_step_and_the_second_of_its_kind_is_not():
    signals, leave, noted = heard(in_steps=True)
    signals.hear(signal.SIGUSR1, 10.0)
    assert (leave, noted, signals.asked) == ([], [signal.SIGUSR1], signal.SIGUSR1)
    signals.hear(signal.SIGTERM, 20.0)  # another kind: SLURM warns with one and ends with the other
    assert (leave, signals.asked) == ([], signal.SIGUSR1)
    signals.hear(signal.SIGUSR1, 30.0)
    assert leave == [signal.SIGUSR1]


def test_two_within_a_second_are_one():
    """A terminal's Ctrl-C reaches every process, and torchrun sends it on."""
    signals, leave, _ = heard(in_steps=True)
    signals.hear(signal.SIGINT, 10.0)
    signals.hear(signal.SIGINT, 10.0 + ONE_SECONDS / 2)
    assert not leave
    signals.hear(signal.SIGINT, 10.1 + ONE_SECONDS)
    assert leave == [signal.SIGINT]


SLEEPER = """
import os, sys, threading
from megatron_powerflow.signals import Signals
with Signals(lambda number: os._exit(70 + number), print) as signals:
    if sys.argv[1] == "steps":
        signals.begin_steps()
    print("ready", flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()  # a main thread that no Python handler would reach in time: it waits in C
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(("stage", "times"), [("loading", 1), ("steps", 2)])
def test_a_main_thread_that_waits_in_c_is_left_all_the_same(number, stage, times):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, stage],
        stdout=subprocess.PIPE,
        text=True,
        # a shell's background jobs, this test among them perhaps, ignore Ctrl-C, and what is ignored stays so
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(times - 1):
            process.send_signal(number)
            time.sleep(ONE_SECONDS * 3)
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(timeout=30) == 70 + number
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


FORKER = """
import os, signal, sys, time
from megatron_powerflow.children import end_forked_with_parent
from megatron_powerflow.signals import Signals
end_forked_with_parent()
with Signals(lambda number: print("the parent heard", number, flush=True), print):
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    if sys.argv[1] == "child":
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.3)
        print(os.waitstatus_to_exitcode(status), flush=True)
    else:
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_signal_to_a_forked_child_is_the_childs():
    """Such as the end that Megatron's writers are sent: not a request to the run."""
    done = subprocess.run([sys.executable, "-c", FORKER, "child"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{-signal.SIGTERM}\n"


def test_a_forked_child_ends_soon_after_a_parent_that_was_killed():
    done = subprocess.run([sys.executable, "-c", FORKER, "parent"], capture_output=True, text=True, timeout=60)
    child = int(done.stdout)
    deadline = time.monotonic() + 20 * LOOK_SECONDS
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")


SPAWNER = """
import multiprocessing, os, signal
import megatron_powerflow.cli  # as the entry module of a run is

if __name__ == "__main__":
    manager = multiprocessing.get_context("spawn").Manager()
    print(manager._process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_spawned_queue_server_ends_soon_after_a_parent_that_was_killed(tmp_path):
    """Megatron keeps one for the results of its writers."""
    script = tmp_path / "spawner.py"
    script.write_text(SPAWNER)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    child = int(done.stdout)
    deadline = time.monotonic() + 20 * LOOK_SECONDS
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)
