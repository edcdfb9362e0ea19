"""What becomes of a job on the local SLURM: its steps, its states, its log, until it has ended for good?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE")
TIMEOUT_SECONDS = 900.0


class Job:
    """`sbatch OPTIONS SCRIPT ARGUMENTS` in a folder of its own. run: the folder of the training run."""

    def __init__(self, cluster, folder: Path, run: Path, script: str, arguments: list[str], *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.cluster, self.run, self.log = cluster, run, folder / "job.log"
        self._began = time.monotonic()
        words = ["sbatch", "--parsable", "--gres=none", f"--output={self.log}", *options]
        self.id = cluster.run(*words, f"examples/{script}", *arguments, cwd=REPOSITORY).strip()
        self.written_by_lost_start = ""

    @property
    def seconds(self) -> float:
        """Since it was submitted."""
        return time.monotonic() - self._began

    def field(self, name: str) -> str:
        """A field of `scontrol show job`, such as JobState, Restarts or ExcNodeList."""
        text = self.cluster.run("scontrol", "show", "job", self.id)
        return next(word.split("=", 1)[1] for word in text.split() if word.startswith(f"{name}="))

    @property
    def said(self) -> str:
        """The job's log."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def line(self, pattern: str) -> str:
        """The first line of the log in which the pattern is; empty where there is none."""
        return next((line.strip() for line in self.said.splitlines() if re.search(pattern, line)), "")

    def num_steps(self) -> int:
        """Lines of metrics.jsonl."""
        metrics = self.run / "metrics.jsonl"
        return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Raises RuntimeError, with the log, where it does not come about, or the job ends first."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            if time.monotonic() > deadline or self.field("JobState") in OVER:
                if condition():
                    return
                raise RuntimeError(f"job {self.id} ({self.field('JobState')}), waiting until {what}:\n{self.said}")
            time.sleep(0.3)

    def wait_for_steps(self, count: int) -> None:
        """Wait until so many steps are done."""
        self.wait_until(lambda: self.num_steps() >= count, f"{count} steps are done")

    def finish(self) -> str:
        """Wait until the job has ended for good, and return its state. A requeued job need not wait its two minutes."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (state := self.field("JobState")) not in OVER or self._was_lost(state):
            if time.monotonic() > deadline:
                raise RuntimeError(f"job {self.id} is {state} still:\n{self.said}")
            if state == "PENDING" and self.field("Restarts") != "0":
                self._hasten()
            time.sleep(0.5)
        return state

    def _hasten(self) -> None:
        states = set(self.cluster.run("sinfo", "--noheader", "--Node", "--format=%t").split())
        if not {state for state in states if state.startswith(("comp", "alloc", "mix"))}:
            self.written_by_lost_start = self.said
            self.cluster.run("scontrol", "update", f"JobId={self.id}", "StartTime=now")
            time.sleep(3)

    def _was_lost(self, state: str) -> bool:
        """Whether SLURM lost a start before a word of ours, as it can where the start before was still being cleared
        away: an operator puts the job back."""
        if state != "FAILED" or not self.written_by_lost_start or self.said != self.written_by_lost_start:
            return False
        self.cluster.run("scontrol", "requeue", self.id)
        return True
