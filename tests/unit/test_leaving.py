"""The end of a command's process: the exit code, every duty done, and nothing taken down behind them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

PROGRAM = """
import atexit, sys, threading, time
from megatron_powerflow.cli.leaving import run_and_leave
from megatron_powerflow.errors import RequeueRequested, UserError


class TakenDown:
    def __del__(self):
        print("taken down", flush=True)


def later():
    time.sleep(0.3)
    print("thread")


def program():
    atexit.register(lambda: print("duty"))
    threading.Thread(target=later).start()
    print("buffered", end=" ")
    {end}


kept = TakenDown()
run_and_leave(program)
"""


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("return", 0, ""),
        ("sys.exit(0)", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("raise UserError(['a', 'b'])", 2, "error: a\nerror: b\n"),
        ("raise RequeueRequested('again')", 75, "again\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
    ],
)
def test_a_process_does_its_duties_and_leaves_with_its_exit_code(end, code, words):
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == code, done.stderr
    assert done.stdout == "buffered thread\nduty\n"
    assert done.stderr.endswith(words)
    assert ("Traceback" in done.stderr) == (code == 1)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_where_the_output_has_no_room_it_is_said(monkeypatch, unbuffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-m", "megatron_powerflow.cli", "recipes"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: the output cannot be written: no space left where it goes\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_whoever_reads_the_output_may_go_before_its_end(unbuffered):
    command = f"{sys.executable} -m megatron_powerflow.cli recipes | true"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", command], stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, timeout=60, env=environment
    )
    assert done.stderr == ""
