"""PowerFlow, read aloud: sample, score with the frozen base, update towards its alpha-power.

    for each step: prompts -> rollouts -> micro-batches -> reference scores -> update -> metrics -> checkpoint

Left out: the step itself, from prompts to the update (`training/step.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from rich.console import Console

from megatron_powerflow.checkpoint.folder import EXPORT_NAME
from megatron_powerflow.checkpoint.keeping import Keeping
from megatron_powerflow.checkpoint.saving import Saver
from megatron_powerflow.checkpoint.state import RunProgress
from megatron_powerflow.data.prompts import PromptStream
from megatron_powerflow.errors import RequeueRequested
from megatron_powerflow.hf.live_weights import export_to_hf
from megatron_powerflow.metrics.provenance import note_launch
from megatron_powerflow.model.precision import require_fp8_support
from megatron_powerflow.model.recompute import require_recompute_support
from megatron_powerflow.model_card import card_files
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.together import on_main
from megatron_powerflow.records import Prompt
from megatron_powerflow.run_end import RunEnd
from megatron_powerflow.run_events import RunEvents, begin
from megatron_powerflow.run_folder import run_folder, take_run_folder
from megatron_powerflow.run_output import RunOutput, announced
from megatron_powerflow.serving.pool import NoServer
from megatron_powerflow.training.plan import Plan, write_config
from megatron_powerflow.training.served_rollouts import with_servers
from megatron_powerflow.training.session import Session, build_session, from_whole_checkpoint
from megatron_powerflow.training.skipped import refuse_endless_skipping
from megatron_powerflow.training.step import run_step
from megatron_powerflow.training.stop_signal import StopSignal, time_limit_of


def train(plan: Plan, launch: Launch, console: Console, *, command: str = "", end: RunEnd | None = None) -> None:
    """Run `plan` to its end on this rank. Raises RequeueRequested or Interrupted when asked to stop, and saved.

    command: what the run's folder says started it. end: entered; None where nobody hears signals or other ranks.
    """
    end = end or RunEnd(launch)
    model, precision, parallel = plan.config.model, plan.config.precision, plan.config.parallel
    require_fp8_support(precision, plan.architecture, parallel)
    require_recompute_support(model, precision, plan.architecture, parallel.cp)
    with (
        run_folder(plan) as owner,
        RunEvents(plan.run_folder) as events,
        initialized(
            plan.layout, launch, seed=plan.config.run.seed, deterministic=plan.config.run.deterministic
        ) as groups,
        end.watched(plan.run_folder, owner, groups, lambda: take_run_folder(plan, owner), plan.config.run.hang_seconds),
    ):
        begin(events, groups)
        plan = from_whole_checkpoint(plan, groups, console)
        with announced(f"loading {plan.config.model.hf_path}", console if groups.is_main else None):
            session = with_servers(plan, build_session(plan, groups), console.print)
            end.loaded(session.trainable.chunks)
            session.engine.show_life(end.pulse.beat, lambda: end.signals.asked is not None)
        on_main(lambda: note_start(plan, groups, command, session.progress.step), groups)
        with (
            closing(session.engine),
            RunOutput(plan, session, console, events, end.pulse) as output,
            saver_of(plan, groups, console, events) as saver,
        ):
            saver.remove_old(session.progress.step)
            limit = time_limit_of(plan.config.run, end.pulse, started=end.began) if groups.is_main else None
            stop = StopSignal(plan.run_folder, owner, groups, end.signals, end.pulse, limit, console)
            progress = run_steps(plan, session, output, stop, saver)
            output.show_change()
            if plan.config.run.export and output.may_export():
                with output.phase("export"):
                    export_policy(plan, session, progress.step, command)
        events.finished()


def note_start(plan: Plan, groups: Groups, command: str, first_step: int) -> None:
    """Write what this start is into the run's folder. For the main rank; raises OSError."""
    note_launch(
        plan.run_folder,
        command=command,
        first_step=first_step,
        world_size=groups.world_size,
        revisions=plan.located.revisions,
        changed=[change.to_json() for change in plan.resume.changed],
    )
    write_config(plan)
    plan.inputs.write(plan.run_folder)


def export_policy(plan: Plan, session: Session, step: int, command: str) -> None:
    """Write the policy after `step` steps as RUN/hf_export. Collective."""
    groups = session.groups
    export_to_hf(
        session.trainable.chunks,
        plan.architecture,
        plan.family,
        groups,
        companions=plan.hf_folder,
        out=plan.run_folder / EXPORT_NAME,
        source=plan.run_folder,
        more=on_main(lambda: card_files(plan.run_folder, step, command, plan.model_folder), groups),
    )


def run_steps(plan: Plan, session: Session, output: RunOutput, stop: StopSignal, saver: Saver) -> RunProgress:
    """The algorithm."""
    config, progress = plan.config, session.progress
    stream = PromptStream(
        plan.prompts, seed=config.run.seed, shuffle=config.prompts.shuffle, position=progress.position
    )
    for step in range(progress.step, config.run.num_steps):
        if output.alarmed() or output.reached():
            break
        with saved_without_servers(session, saver, output, progress):
            output.evaluate_if_due(step)
            prompts = stream.take(config.rollout.prompts_per_step)
            coming = prompts_ahead(plan, stream, step)
            result = run_step(
                plan, session, prompts, step, coming=coming, phase=output.phase, progress=output.rollout_progress
            )
        progress = advance(progress, stream, skipped=result.skipped)
        output.write(step, result, progress)
        if saver.is_pending:
            with output.phase("checkpoint"):
                saver.settle(wait=result.skipped, skipping=result.skipped)
        refuse_endless_skipping(plan, session, result, progress)
        last = step + 1 == config.run.num_steps or output.alarmed() or output.reached()
        stopping = stop.requested(saver.seconds)
        if last or stopping or (config.checkpoint.interval and (step + 1) % config.checkpoint.interval == 0):
            with output.phase("checkpoint"):
                saver.save(session.trainable, progress, wait=last or stopping)
        if stopping and not last:
            raise stop.ending(step + 1)
    with saved_without_servers(session, saver, output, progress):
        output.evaluate_if_due(progress.step)
    return progress


def prompts_ahead(plan: Plan, stream: PromptStream, step: int) -> list[list[Prompt]]:
    """Return the prompts of the steps behind `step` whose responses are drawn while it trains."""
    rollout = plan.config.rollout
    num_ahead = min(rollout.steps_ahead, plan.config.run.num_steps - step - 1)
    size = rollout.prompts_per_step
    return [stream.coming(size, behind=size * later) for later in range(num_ahead)]


@contextmanager
def saved_without_servers(session: Session, saver: Saver, output: RunOutput, progress: RunProgress) -> Iterator[None]:
    """Save the run as it was before this step where no server could be asked in it, and ask to be requeued."""
    try:
        yield
    except NoServer as error:
        if progress.step > session.progress.step:
            with output.phase("checkpoint"):
                saver.save(session.trainable, progress, wait=True)
        text = f"{error}; the run is saved after step {progress.step}, and the same command continues it"
        raise RequeueRequested(text, by="no server") from None


def saver_of(plan: Plan, groups: Groups, console: Console, events: RunEvents) -> Saver:
    """Return what writes this run's checkpoints, and notes them as events."""
    section = plan.config.checkpoint
    return Saver(
        plan.run_folder,
        groups,
        companions=plan.hf_folder,
        keeping=Keeping(section.keep, section.keep_every),
        asynchronous=section.asynchronous,
        say=console.print,
        saved=events.saved,
    )


def advance(progress: RunProgress, stream: PromptStream, *, skipped: bool) -> RunProgress:
    """Count one more step. skipped: it left the weights as they were."""
    return replace(
        progress,
        step=progress.step + 1,
        position=stream.position,
        skipped_in_a_row=progress.skipped_in_a_row + 1 if skipped else 0,
        num_skipped=progress.num_skipped + skipped,
    )
