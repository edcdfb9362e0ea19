"""What does a run show of itself while it goes on? Metrics, samples, evaluations, alarms, the console.

Only the main rank writes; collective parts run on every rank alike. What the disk refuses ends all of them together.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.text import Text

from megatron_powerflow.checkpoint.folder import CHECKPOINTS_NAME, checkpoints_of
from megatron_powerflow.checkpoint.state import RunProgress
from megatron_powerflow.metrics.alarm import ALARMS, has_diverged, raised_alarms
from megatron_powerflow.metrics.alarm_words import ADVICE, alarms_that_end_run, thresholds_of
from megatron_powerflow.metrics.change import change_table, changes_of
from megatron_powerflow.metrics.realised_alpha import alpha_reached
from megatron_powerflow.metrics.reduce import ReductionSettings, reduce_rollouts
from megatron_powerflow.metrics.step_log import EVALUATIONS_NAME, SAMPLES_NAME, StepLog, read_step_log
from megatron_powerflow.metrics.throughput import PhaseClock, peak_memory_bytes, throughput
from megatron_powerflow.metrics.writers import ConsoleWriter, JsonlWriter, TensorBoardWriter, WandbWriter
from megatron_powerflow.parallel.pulse import Pulse
from megatron_powerflow.parallel.together import any_rank, on_main
from megatron_powerflow.records import Purpose, SamplingParams, StepMetrics
from megatron_powerflow.report.change_picture import CHANGE_NAME, draw_change
from megatron_powerflow.report.curves import CURVES_NAME, draw_curves
from megatron_powerflow.rollout.sampling_params import sampling_params
from megatron_powerflow.run_events import RunEvents
from megatron_powerflow.training.in_training_evaluation import evaluate_held_out
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.session import Session
from megatron_powerflow.training.staleness import SampledBy
from megatron_powerflow.training.step import StepResult

# Every evaluation of a run draws with the uniforms of this step: what differs between two of them is the policy.
EVALUATION_SEED_STEP = 0


class RunOutput:
    """Everything a run writes beside its checkpoints. A context: files are closed however the run ends."""

    def __init__(self, plan: Plan, session: Session, console: Console, events: RunEvents, pulse: Pulse) -> None:
        self._plan, self._session, self._console = plan, session, console
        self._events, self._pulse = events, pulse
        self._writers: list = []
        self._line: ConsoleWriter | None = None
        self._clock = PhaseClock()
        self._lines: list[dict[str, float]] = []  # of metrics.jsonl; what the alarm listens to
        self._alarms: dict[str, str] = {}  # that ring after the last step, with what was seen
        self._diverged = False
        self._thresholds = thresholds_of(plan.config)
        self._reached: str | None = None  # why run.stop_at_alpha ends the run
        self._logs: dict[str, StepLog] = {}

    def __enter__(self) -> RunOutput:
        on_main(self._open, self._session.groups)
        return self

    def _open(self) -> None:
        plan, first_step = self._plan, self._session.progress.step
        if first_step:
            self._console.print(f"continuing after step {first_step} from {plan.resume_from}")
        metrics = JsonlWriter(plan.run_folder, first_step=first_step)
        self._logs = {
            name: StepLog(plan.run_folder / name, first_step=first_step) for name in (SAMPLES_NAME, EVALUATIONS_NAME)
        }
        for note in (*metrics.notes, *(note for log in self._logs.values() for note in log.notes)):
            self._console.print(f"notice: {note}")
        self._writers, self._lines = [metrics], metrics.lines
        self._alarms = raised_alarms(self._lines, self._thresholds)
        self._diverged = has_diverged(self._lines, self._thresholds)
        self._note_reached()
        if plan.config.metrics.tensorboard:
            self._writers.append(TensorBoardWriter(plan.run_folder, first_step=first_step))
        if plan.config.metrics.wandb != "off":
            config = plan.config.model_dump(exclude_none=True)
            run_id, name = self._session.progress.wandb_run_id, plan.config.run.name
            self._writers.append(
                WandbWriter(plan.config.metrics, plan.run_folder, config, run_id, name, say=self._console.print)
            )
        self._events.loaded(first_step=first_step, num_dropped=metrics.num_dropped)
        self._line = ConsoleWriter(self._console, first_step=first_step, num_steps=plan.config.run.num_steps)
        self._writers.append(self._line)

    def __exit__(self, kind, error, traceback) -> None:
        for writer in self._writers:
            writer.close()
        if self._session.groups.is_main and kind is None and self._plan.config.metrics.curves:
            later = "; `powerflow curves` draws it from the run's folder"
            self._draw(CURVES_NAME, lambda out: draw_curves([self._plan.run_folder], out), later)

    def show_change(self) -> None:
        """Show by a table and a picture how answers to the held-out prompts changed, if there are two evaluations."""
        if not self._session.groups.is_main or not self._plan.evaluation_prompts:
            return
        alpha = self._plan.config.objective.alpha
        try:
            changes = changes_of(read_step_log(self._plan.run_folder / EVALUATIONS_NAME))
            table = None if changes is None else change_table(changes, alpha)
        except Exception as error:  # whatever a line of that file holds, the run is finished and saved
            self._console.print(f"no table of before and after: {type(error).__name__}: {error}")
            return
        if changes is None:
            return
        self._console.print(table)
        if self._plan.config.metrics.curves:
            self._draw(CHANGE_NAME, lambda out: draw_change(changes, alpha, out))

    def _draw(self, name: str, draw: Callable[[Path], object], later: str = "") -> None:
        try:
            draw(self._plan.run_folder / name)
        except Exception as error:  # whatever is wrong with a picture, the run is finished and saved
            self._console.print(f"no {name}: {error}{later}")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show what is going on, and count its seconds for the next line of metrics."""
        self._say(name)
        with self._clock(name), self._events.phase(name), self._pulse.during(name):
            yield
        self._say("")

    def rollout_progress(self, done: int, total: int) -> None:
        """Show how many of the responses are done."""
        self._say(f"rollout {done}/{total}")

    def _say(self, text: str) -> None:
        if self._line is not None:
            self._line.phase(text)

    def write(self, step: int, result: StepResult, progress: RunProgress) -> None:
        """Write one step's metrics everywhere. Collective: the peak memory, in bytes, is that of the worst rank."""
        config, groups = self._plan.config, self._session.groups
        target = ReductionSettings(
            responses_per_prompt=config.rollout.responses_per_prompt,
            max_response_tokens=config.rollout.max_response_tokens,
            alpha=result.alpha,
            tilt_cap=config.objective.tilt_cap,
            has_tilt=config.objective.form.tilts,
            energy_per_token=config.objective.form.per_length,
            learns_log_z=config.objective.learns_log_z,
            has_lag=self._plan.sampled_by is SampledBy.OLDER,
        )
        values = reduce_rollouts(result.rows.numpy(), target)
        finite = [taken.grad_norm for taken in result.optimizer_steps if taken.applied]
        if finite:
            values["grad_norm"] = sum(finite) / len(finite)  # mean over the step's updates
        values |= {"lr": result.lr, "num_skipped": float(progress.num_skipped)}
        values |= throughput(self._clock.take(), values["num_prompt_tokens"], values["num_response_tokens"])
        peak = torch.tensor([peak_memory_bytes()])
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=groups.control)
        values["peak_memory_bytes"] = float(peak)
        on_main(lambda: self._write(step, values), groups)

    def _write(self, step: int, values: dict[str, float]) -> None:
        self._listen(step, values)
        for writer in self._writers:
            writer.write(StepMetrics(step, values))
        self._events.step(step)

    def _listen(self, step: int, values: dict[str, float]) -> None:
        """Add the alarms to the metrics, and print each one when it begins."""
        self._lines.append(values)
        rings = raised_alarms(self._lines, self._thresholds)
        self._note_reached()
        values["alarm"] = float(bool(rings))
        values |= {f"alarm_{name}": float(name in rings) for name in ALARMS}
        for name in rings.keys() - self._alarms.keys():
            margin = f", trap_margin {values['trap_margin']:.1f} nats" if "trap_margin" in values else ""
            seen = f"{rings[name]}{margin if name == 'length' else ''}. {ADVICE[name]}"
            self._console.print(Text.assemble((f"alarm {name}", "bold red"), f" at step {step + 1}: {seen}"))
        self._alarms, self._diverged = rings, has_diverged(self._lines, self._thresholds)

    def alarmed(self) -> bool:
        """Whether an alarm rings that is to end the run. Collective; the same answer on every rank."""
        return any_rank(bool(self._alarms.keys() & alarms_that_end_run(self._plan.config)), self._session.groups)

    def may_export(self) -> bool:
        """Whether the policy may be exported: not where it has diverged. Prints every alarm that rings. Collective."""
        diverged = any_rank(self._diverged, self._session.groups)
        if self._alarms:
            what = "the policy has diverged and is not exported" if diverged else "the exported policy is that one"
            run = self._plan.run_folder
            message = f" {', '.join(self._alarms)} rings at the end of this run: {what}"
            if known := checkpoints_of(run):
                message += (
                    f". To write an earlier one: powerflow export {known[0]} --out {run}_earlier; "
                    f"`ls {run}/{CHECKPOINTS_NAME}` shows which there are"
                )
            self._console.print(Text.assemble(("alarm", "bold red"), message))
        return not diverged

    def _note_reached(self) -> None:
        """Note whether the metrics reached run.stop_at_alpha, and print it when it begins."""
        before, stop_at = self._reached, self._plan.config.run.stop_at_alpha
        self._reached = None if stop_at is None else alpha_reached(self._lines, stop_at)
        if self._reached and not before:
            self._console.print(f"{self._reached}: the run ends after step {len(self._lines)}")

    def reached(self) -> bool:
        """Whether the policy has come as far as run.stop_at_alpha asks. Collective; the same answer on every rank."""
        asked = self._plan.config.run.stop_at_alpha is not None
        return asked and any_rank(self._reached is not None, self._session.groups)

    def evaluate_if_due(self, step: int) -> None:
        """Sample, and answer the held-out prompts, where that is due before `step`. Collective."""
        self._pulse.step = step
        interval = self._plan.config.evaluation.interval
        ended = step == self._plan.config.run.num_steps or self.alarmed() or self.reached()
        if step == 0 or ended or (interval and step % interval == 0):
            self._sample(step)
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        """Evaluate on the held-out prompts, into evaluations.jsonl."""
        plan, section = self._plan, self._plan.config.evaluation
        if not plan.evaluation_prompts:
            return
        assert section.num_responses is not None, "config_rules.py fills it in where there are prompts"
        sampling = self._sampling(section.num_responses)
        with self.phase("evaluation"):
            line = evaluate_held_out(plan, self._session, sampling, step, self.rollout_progress)
        self._append(EVALUATIONS_NAME, step, [] if line is None else [line])

    def _sampling(self, responses_per_prompt: int) -> SamplingParams:
        """Return the sampling of training, with the same uniforms each time: what differs is the policy."""
        return sampling_params(
            self._plan.config,
            self._plan.stop_token_ids,
            step=EVALUATION_SEED_STEP,
            responses_per_prompt=responses_per_prompt,
        )

    def _sample(self, step: int) -> None:
        """Answer the first prompts of the file, into samples.jsonl.

        The answers are short: where launches bound decoding, a few rows take as long as all of a step's.
        """
        plan, section = self._plan, self._plan.config.evaluation
        if not section.samples:
            return
        prompts = list(enumerate(plan.prompts[: section.samples]))
        assert section.sample_tokens is not None, "config_rules.py fills it in where there are samples"
        limit = min(section.sample_tokens, plan.config.rollout.max_response_tokens)
        sampling = replace(self._sampling(1), purpose=Purpose.SAMPLES, max_response_tokens=limit)
        with self.phase("samples"):
            rollouts = self._session.engine.generate(prompts, sampling)
        decode = plan.tokenizer.decode
        lines = [
            {
                "step": step,
                "id": rollout.prompt.id,
                "prompt": decode(rollout.prompt.token_ids),
                "question": rollout.prompt.text,
                "response": decode(rollout.response_token_ids),
                "answer": rollout.prompt.answer,
                "finish_reason": rollout.finish_reason,
                "num_response_tokens": len(rollout.response_token_ids),
            }
            for rollout in rollouts
        ]
        self._append(SAMPLES_NAME, step, lines)

    def _append(self, name: str, step: int, lines: Sequence[dict]) -> None:
        on_main(lambda: self._logs[name].append(step, lines), self._session.groups)


@contextlib.contextmanager
def announced(what: str, console: Console | None) -> Iterator[None]:
    """Print that something long begins, then how many seconds it took. console: None on ranks that do not print."""
    start = time.monotonic()
    if console is not None:
        console.print(what)
    yield
    if console is not None:
        console.print(f"  took {time.monotonic() - start:.1f} s")
