"""Where do a step's numbers go? To metrics.jsonl, wandb, TensorBoard and the console. Only the main rank writes.

metrics.jsonl is the record: one line a step, flushed as it is written and cut back to the checkpoint on resume, so
that a resumed run's file equals that of a run that was never interrupted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from megatron_powerflow.config import MetricsSection
from megatron_powerflow.console import QUIET_SECONDS, Heartbeat, duration
from megatron_powerflow.errors import UserError
from megatron_powerflow.records import StepMetrics
from megatron_powerflow.whole_files import write_file

FILE_NAME = "metrics.jsonl"


class JsonlWriter:
    """Appends one JSON object per step to metrics.jsonl.

    first_step: of this start; lines of this step and later ones are from a try that was lost, and are dropped.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        path = folder / FILE_NAME
        kept = [line for line in read_metrics(folder) if line["step"] < first_step]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Appends the line of a step, which is in the file when the method returns."""
        self._file.write(json.dumps({"step": metrics.step, **metrics.values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Returns the lines of a run's metrics.jsonl up to the first damaged one, as a crash leaves at the end."""
    path = folder / FILE_NAME
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(values, dict):
            break
        lines.append(values)
    return lines


class WandbWriter:
    """Writes one wandb run per training run, however often it is resumed; offline where no key is configured."""

    def __init__(
        self, section: MetricsSection, folder: Path, config: dict[str, Any], run_id: str, name: str | None = None
    ) -> None:
        import wandb

        self.run = wandb.init(
            project=section.wandb_project,
            id=run_id,
            name=name or folder.name,
            mode=_wandb_mode(section),
            resume="allow",
            dir=str(folder),
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )

    def write(self, metrics: StepMetrics) -> None:
        """Sends the numbers of a step to wandb."""
        self.run.log(metrics.values, step=metrics.step)

    def close(self) -> None:
        """Ends the wandb run."""
        self.run.finish()


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
    """Writes every number of a step to RUN/tensorboard, for `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # steps from first_step on that an earlier start wrote are hidden
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, metrics: StepMetrics) -> None:
        """Writes the numbers of a step, one scalar each."""
        for name, value in metrics.values.items():
            self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


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
