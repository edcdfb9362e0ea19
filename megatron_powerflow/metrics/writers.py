"""Where do a step's numbers go? To metrics.jsonl, wandb, TensorBoard and the console. Only the main rank writes.

metrics.jsonl is the record: one line a step, on the disk when it is written and cut back to the checkpoint on resume,
so that a resumed run's file equals that of a run that was never interrupted.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_powerflow.config import MetricsSection
from megatron_powerflow.console import QUIET_SECONDS, Heartbeat, duration
from megatron_powerflow.errors import UserError
from megatron_powerflow.journal import Line, append_lines, cut_back, notes_of, read_journal
from megatron_powerflow.metrics.step_log import START, without_step
from megatron_powerflow.records import StepMetrics

FILE_NAME = "metrics.jsonl"


class JsonlWriter:
    """Appends one JSON object per step to metrics.jsonl.

    first_step: of this start; lines of this step and later ones are from a try that was lost, and are dropped. lines:
    those before it; num_dropped: steps of the lost try; notes: what is damaged in the file or gone. Raises OSError that
    names the file.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._path = folder / FILE_NAME
        cut = cut_back(self._path, first_step, _wrong_with, start=START)
        self.lines: list[dict[str, float]] = cut.kept
        self.num_dropped = cut.num_cut
        self.notes = notes_of(self._path, cut.damages)
        if (lacking := first_step - len({line["step"] for line in cut.kept}) - len(cut.damages)) > 0:
            self.notes.append(
                f"{self._path}: has no line of {lacking} of the {first_step} steps before this start; alarms and "
                "curves do without them"
            )

    def write(self, metrics: StepMetrics) -> None:
        """Appends the line of a step, which is on the disk when the method returns."""
        append_lines(self._path, [{"step": metrics.step, **metrics.values}])

    def close(self) -> None:
        """Does nothing: every line is on the disk already."""


def read_metrics(folder: Path, notes: list[str] | None = None) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl. A damaged one is left out, and named in `notes` where they are given.

    Each line has a `step`, and every value in it is a number.
    """
    path = folder / FILE_NAME
    journal = read_journal(path, _wrong_with, start=START)
    if notes is not None:
        notes += notes_of(path, journal.damages)
    return journal.lines


def _wrong_with(line: Line) -> str | None:
    if wrong := without_step(line):
        return wrong
    bad = next((name for name, value in line.items() if not _is_number(value)), None)
    return None if bad is None else f"{bad[:40]!r} is no number"


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


class WandbWriter:
    """Writes one wandb run per training run, however often it is resumed; offline where no key is configured.

    wandb is foreign: whatever fails in it is said once, and the run goes on without it. say: prints a line.
    """

    def __init__(
        self,
        section: MetricsSection,
        folder: Path,
        config: dict[str, Any],
        run_id: str,
        name: str | None = None,
        *,
        say: Callable[[str], None],
    ) -> None:
        import wandb

        self._say, self.run = say, None
        mode = _wandb_mode(section)

        def begin() -> None:
            self.run = wandb.init(
                project=section.wandb_project,
                id=run_id,
                name=name or folder.name,
                mode=mode,
                resume="allow",
                dir=str(folder),
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )

        self._try(begin)

    def write(self, metrics: StepMetrics) -> None:
        """Sends the numbers of a step to wandb."""
        if self.run is not None:
            self._try(partial(self.run.log, metrics.values, step=metrics.step))

    def close(self) -> None:
        """Ends the wandb run."""
        if self.run is not None:
            self._try(self.run.finish)

    def _try(self, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:  # of another program, about numbers that metrics.jsonl holds
            self.run = None
            what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self._say(f"wandb: {what}; the run goes on without it, and metrics.jsonl holds every number")


def _wandb_mode(section: MetricsSection) -> Literal["online", "offline"] | None:
    """Returns wandb's mode; None leaves it to wandb's own settings (WANDB_MODE), where a key is configured."""
    import wandb

    assert section.wandb != "off", "with off no WandbWriter is made"
    if section.wandb != "auto":
        return section.wandb
    try:
        return None if wandb.login(prompt=False, verify=False) else "offline"
    except wandb.errors.AuthenticationError as error:
        raise UserError(f"wandb: {error}; correct the key, or set metrics.wandb=offline") from None


class TensorBoardWriter:
    """Writes every number of a step to RUN/tensorboard, for `tensorboard --logdir RUN`.

    Through TensorBoard's own records, but not through SummaryWriter: that one writes in a thread, where a full disk
    ends in a traceback and, some steps later, in an error of another step. Raises OSError that names the file.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        (folder / "tensorboard").mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / "tensorboard" / name
        self._file = self._path.open("ab")
        self._records = RecordWriter(self._file)
        # the start of a session hides steps from first_step on that an earlier start wrote
        begun = Event(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._write([Event(file_version="brain.Event:2"), begun])

    def write(self, metrics: StepMetrics) -> None:
        """Writes the numbers of a step, one scalar each."""
        from torch.utils.tensorboard.summary import scalar

        self._write(
            [self._event(step=metrics.step, summary=scalar(name, value)) for name, value in metrics.values.items()]
        )

    def close(self) -> None:
        """Closes the event file; what could not be written was said at its step."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, events: Sequence[Any]) -> None:
        try:
            for event in events:
                event.wall_time = time.time()
                self._records.write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class ConsoleWriter:
    """Shows a live line on a terminal; elsewhere it prints a plain line a step, and one a minute within long steps.

    All of them show the same time left: the mean step so far for each step that remains, less what the step under way
    has taken.
    """

    def __init__(
        self,
        console: Console,
        *,
        first_step: int,
        num_steps: int,
        quiet_seconds: float = QUIET_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: seconds that only grow."""
        self._clock = clock
        self._console, self._num_steps, self._first_step = console, num_steps, first_step
        self._start = self._written = clock()
        self._done, self._phase = first_step, ""
        self._live = Progress(
            TextColumn("training", style="bold"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total} steps"),
            TextColumn("{task.fields[phase]}", markup=False),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("training", total=num_steps, completed=first_step, phase="", left="")
        self._live.start()
        self._heartbeat = Heartbeat(console, self.under_way, quiet_seconds=quiet_seconds).start()

    def phase(self, text: str) -> None:
        """Sets the text that says what is going on within the step."""
        self._phase = text
        self._live.update(self._task, phase=text, left=self._left())

    def write(self, metrics: StepMetrics) -> None:
        """Prints the line of a step that has ended, and moves the live line on."""
        self._done, self._written, value = metrics.step + 1, self._clock(), metrics.values
        parts = [
            f"step {self._done}/{self._num_steps}",
            f"loss {value['loss']:.4g}" if "loss" in value else "loss -",
            f"log Z' {value['log_z_mean']:+.3f}" if "log_z_mean" in value else "log Z' -",
            *([f"realised alpha {value['alpha_realised']:.2f}"] if "alpha_realised" in value else []),
            f"length {value['response_length_mean']:.1f}",
            f"truncated {value['truncated_fraction']:.1%}",
            f"grad {value['grad_norm']:.3g}" if "grad_norm" in value else "grad -",
            f"{value['tokens_per_second']:.0f} tok/s",
            f"{value['step_seconds']:.3g} s/step",
        ]
        left = self._left()
        self._live.update(self._task, completed=self._done, left=left)
        self._console.print("  ".join([*parts, left] if left else parts))
        self._heartbeat.spoke()

    def close(self) -> None:
        """Takes the live line away and stops the lines within a step."""
        self._heartbeat.close()
        self._live.stop()

    def under_way(self) -> str:
        """Returns the line within a step. Example: step 3/10 done  rollout 5/16  2 min so far  14 min left."""
        if not self._phase:
            return ""
        spent, left = duration(self._clock() - self._written), self._left()
        parts = [f"step {self._done}/{self._num_steps} done", self._phase, f"{spent} so far"]
        return "  ".join([*parts, left] if left else parts)

    def _left(self) -> str:
        """Returns the time left, as text; "" before the first step and after the last one."""
        done, remaining = self._done - self._first_step, self._num_steps - self._done
        if not done or not remaining:
            return ""
        mean = (self._written - self._start) / done
        under_way = min(self._clock() - self._written, mean)
        return f"{duration(mean * remaining - under_way)} left"
