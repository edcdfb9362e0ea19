"""How did a run end, for whoever started it? A small file in its folder, since launchers lose exit codes.

    RUN/outcome.json    {"outcome", "exit_code", "step", "message", "time"}

torchrun ends with 1 whatever its processes said; `powerflow outcome` ends with the code that is in the file. A start
writes "running" first, so no older outcome is read for a newer one, and that is what a run that was killed leaves.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_powerflow.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from megatron_powerflow.whole_files import ordinary, write_file

OUTCOME_NAME = "outcome.json"
RUNNING = "running"
NAMES = {0: "finished", EXIT_REQUEUE: "requeue", EXIT_USER_ERROR: "user_error", EXIT_INTERRUPTED: "interrupted"}
FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended, or that it has not. exit_code: None while it runs; step: steps done; time: since 1970, s."""

    outcome: str
    exit_code: int | None
    step: int | None
    message: str
    time: float

    def describe(self) -> str:
        """Write it as one line for people."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.time))
        steps = "" if self.step is None else f", {self.step} steps done"
        return f"{self.outcome} since {when}{steps}{': ' if self.message else ''}{self.message}"


def outcome_of(exit_code: int, step: int | None, message: str) -> Outcome:
    """Make the outcome of a run that ends with this exit code now."""
    return Outcome(NAMES.get(exit_code, FAILED), exit_code, step, message, time.time())


def running() -> Outcome:
    """Make the outcome of a run that begins now."""
    return Outcome(RUNNING, None, None, "", time.time())


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Replace the folder's outcome, whole or not at all. Raises OSError."""
    write_file(folder / OUTCOME_NAME, json.dumps(asdict(outcome)) + "\n")


def read_outcome(folder: Path) -> Outcome | None:
    """Return what the last start left, None where it left nothing. Raises UserError for a file that is none of ours."""
    path = folder / OUTCOME_NAME
    try:
        values = json.loads(ordinary(path).read_bytes())
        outcome = Outcome(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is no outcome of a run ({error}); remove it and look at the run's log") from None
    texts = (outcome.outcome, outcome.message)
    numbers = (outcome.exit_code, outcome.step)
    fine = all(type(text) is str for text in texts) and all(type(number) in (int, type(None)) for number in numbers)
    fine = fine and type(outcome.time) in (int, float) and 0 <= outcome.time < 1e11
    if not fine or not 0 <= (outcome.exit_code or 0) < 256:
        raise UserError(f"{path}: is no outcome of a run; remove it and look at the run's log")
    return outcome


def remove_outcome(folder: Path) -> None:
    """Remove the outcome of an older start, so that nobody takes it for that of this one."""
    try:
        ours = read_outcome(folder) is not None
    except UserError:
        ours = False  # somebody else's, or damaged: the start that takes the folder replaces it
    if ours:
        (folder / OUTCOME_NAME).unlink(missing_ok=True)
