"""Which incidents are caused, how, and what is promised of each?"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from benchmarks.incidents.bench import Bench, Verdict

STEPS_BEFORE = 3  # that are done when the incident comes


def node_lost(bench: Bench) -> Verdict:
    """Everything on a node falls silent, its daemon too, and does not come back while the job is there."""
    job = bench.submit("node_lost")
    job.wait_for_steps(STEPS_BEFORE)
    bench.cluster.send("n2", signal.SIGSTOP)
    try:
        job.wait_until(lambda: job.field("JobState") != "RUNNING", "SLURM notices")
        bench.cluster.send("n2", signal.SIGKILL)
        state = job.finish()
    finally:
        bench.cluster.send("n2", signal.SIGKILL)
        bench.cluster.start_node("n2")
    words = r"rank 1 on \S+ .* has not been heard of|NODE FAILURE|NODE_FAIL"
    return bench.verdict(
        "node lost",
        "all processes of n2 stopped, its slurmd too; later killed",
        job,
        state,
        words,
        "continuing after step",
    )


def time_limit(bench: Bench) -> Verdict:
    """The time is over before the run is."""
    num_steps = bench.steps_in(110)  # SLURM sends the signal after 90 seconds of a job
    job = bench.submit("time_limit", "--time=2", "--signal=B:USR1@30", settings=(f"run.num_steps={num_steps}",))
    state = job.finish()
    words = (r"stopped after step|the run saves and stops", "back into")
    return bench.verdict("time limit", f"--time=2, {num_steps} steps", job, state, *words, num_steps=num_steps)


def preemption(bench: Bench) -> Verdict:
    """A job of a higher partition takes the nodes."""
    job = bench.submit("preemption", "--partition=low")
    job.wait_for_steps(STEPS_BEFORE)
    bench.cluster.run("sbatch", "--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    job.wait_until(lambda: job.field("JobState") != "RUNNING", "it is preempted")
    return bench.verdict(
        "preemption",
        "a job of a higher partition took all nodes",
        job,
        job.finish(),
        "stopped after step",
        "continuing",
    )


def requeue(bench: Bench) -> Verdict:
    """An operator puts the job back while it runs: SIGTERM, and SIGKILL 30 seconds later."""
    job = bench.submit("requeue")
    job.wait_for_steps(STEPS_BEFORE)
    bench.cluster.run("scontrol", "requeue", job.id)
    return bench.verdict("requeue", "scontrol requeue while it ran", job, job.finish(), "continuing after step")


def rank_hangs(bench: Bench) -> Verdict:
    """A rank stops, and its node lives on."""
    job = bench.submit("rank_hangs")
    job.wait_for_steps(STEPS_BEFORE)
    ranks = [process for process in bench.cluster.processes("n2") if is_command(process, "train", "RANK")]
    min(ranks, key=lambda process: process.create_time()).send_signal(signal.SIGSTOP)  # the others are its own
    state = job.finish()
    words = r"rank 1 on \S+ .* has not been heard of"
    return bench.verdict("a rank hangs", "SIGSTOP to rank 1", job, state, words, "failed, behind a new checkpoint")


def missing_at_preflight(bench: Bench) -> Verdict:
    """A node's task never comes."""
    with each_preflight_task(bench, "n2", lambda task: task.send_signal(signal.SIGSTOP)):
        job = bench.submit("missing")
        state = job.finish()
    return bench.verdict(
        "a node is missing at pre-flight",
        "SIGSTOP to n2's task as it begins",
        job,
        state,
        r"rank 1 on n2 .*did not come|rank 1 on n2: not heard of",
        "without n2; back into the queue",
        excluded="n2",
    )


def slow_at_preflight(bench: Bench) -> Verdict:
    """A node computes at a tenth of its speed."""
    with each_preflight_task(bench, "n2", lambda task: threading.Thread(target=throttle, args=(task,)).start()):
        job = bench.submit("slow", "--", "--preflight", "200")  # its imports, too, take ten times as long
        state = job.finish()
    return bench.verdict(
        "a node is slow at pre-flight",
        "n2's task runs 1 of each 10 ms",
        job,
        state,
        r"n2 is slow: [\d.]+ times",
        "without n2; back into the queue",
        excluded="n2",
    )


def disk_full(bench: Bench) -> Verdict:
    """The disk of the run's folder fills up; when there is room again the same command goes on."""
    disk = bench.folder / "disk"
    with mounted(disk, "size=256m"):
        job = bench.submit("disk_full", run=disk / "run")
        job.wait_for_steps(STEPS_BEFORE)
        subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'filler'}", "bs=4k"], capture_output=True)
        state = job.finish()
        first = bench.verdict(
            "disk full",
            "the run's disk was full from step 3; then room was made, and the job submitted again",
            job,
            state,
            "No space left|no space left",
            exit_code=2,
            restarts=None,  # once, where the outcome of the run, too, cannot be written; then `check` refuses
            num_steps=None,
        )
        (disk / "filler").unlink()
        again = bench.submit("disk_full_again", run=disk / "run")
        second = bench.verdict("", "", again, again.finish(), "continuing after step", restarts=False)
    return Verdict(
        **{
            **first.to_json(),
            "saw": (*first.saw, *second.saw),
            "differs": second.differs,
            "steps_lost": second.steps_lost,
            "seconds": first.seconds + second.seconds,
            "promised": first.promised and second.promised,
        }
    )


def mistake(bench: Bench) -> Verdict:
    """The layout does not fit the model."""
    job = bench.submit("mistake", settings=("parallel.pp=5",))
    return bench.verdict(
        "a mistake in the config",
        "parallel.pp=5 for 4 layers",
        job,
        job.finish(),
        "parallel.pp=5 needs 5 layers or more, and num_layers=4",
        exit_code=2,
        restarts=False,
        num_steps=None,
    )


def port_taken(bench: Bench) -> Verdict:
    """Another program listens where the ranks would meet."""
    job = bench.submit("port_taken", "--hold")
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 20000 + int(job.id) % 12000))
        listener.listen()
        bench.cluster.run("scontrol", "release", job.id)
        state = job.finish()
    return bench.verdict(
        "port taken", "a program listens at the job's port", job, state, r"port \d+ is taken; the next", restarts=False
    )


CASES: dict[str, Callable[[Bench], Verdict]] = {
    function.__name__: function
    for function in (
        mistake,
        port_taken,
        requeue,
        time_limit,
        preemption,
        rank_hangs,
        node_lost,
        missing_at_preflight,
        slow_at_preflight,
        disk_full,
    )
}


def is_command(process: psutil.Process, command: str, variable: str = "SLURM_PROCID") -> bool:
    """Whether a process is a task's `powerflow COMMAND`, and no launcher of it. variable: one that the task has."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "megatron_powerflow.cli" in words and command in words and variable in process.environ()
    return False


@contextlib.contextmanager
def each_preflight_task(bench: Bench, node: str, act: Callable[[psutil.Process], object]) -> Iterator[None]:
    """Let `act` have each pre-flight task of a node once, as soon as it is there, during the block."""
    over, seen = threading.Event(), set()

    def watch() -> None:
        while not over.wait(0.05):
            for process in bench.cluster.processes(node):
                if process.pid not in seen and is_command(process, "preflight"):
                    seen.add(process.pid)
                    act(process)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def throttle(process: psutil.Process) -> None:
    """Let a process run 10 of each 100 ms, until it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.09)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.01)


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own in memory."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
