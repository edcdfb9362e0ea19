"""Which samples and evaluations does a run keep? Journals with lines of a step: samples.jsonl, evaluations.jsonl.

They grow by appending. A resumed run takes away what a lost try wrote, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_powerflow.journal import Line, append_lines, cut_back, notes_of, read_journal

SAMPLES_NAME = "samples.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"
START = b'{"step": '  # of each line


def without_step(line: Line) -> str | None:
    """Says what is wrong with the step of a line; None where it has one."""
    step = line.get("step")
    return None if type(step) is int and 0 <= step < 2**53 else "without a usable step"


def read_step_log(path: Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
    """Returns the lines of a file, each with a `step`; none where there is no file.

    A damaged line is left out, and named in `notes` where they are given. A line of samples.jsonl has id, question,
    prompt, response, answer, finish_reason and num_response_tokens. A line of evaluations.jsonl is explained in
    `training/in_training_evaluation.py`.
    """
    journal = read_journal(path, without_step, start=START)
    if notes is not None:
        notes += notes_of(path, journal.damages)
    return journal.lines


class StepLog:
    """Appends to such a file.

    first_step: of this start; lines of later steps are from a try that was lost, and are taken away at once. Lines of
    first_step itself are what the last start may have ended with; they stay until this one writes that step again.
    notes: what is damaged in the file. Raises OSError that names the file.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        self._path, self._first_step = path, first_step
        cut = cut_back(path, first_step + 1, without_step, start=START)
        self._done_before = any(line["step"] == first_step for line in cut.kept)
        self.notes = notes_of(path, cut.damages)

    def append(self, step: int, lines: Sequence[dict[str, Any]]) -> None:
        """Adds the lines made before step number `step`; they are on the disk when the method returns."""
        if self._done_before and step == self._first_step:
            cut_back(self._path, step, without_step, start=START)
            self._done_before = False
        append_lines(self._path, lines)
