"""What does a process of a proof do? A part of the run, by the same functions as `powerflow train`.

Left out: how the processes start and end (`forks.py`), what is kept of it (`seen.py`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_powerflow.checkpoint.folder import EXPORT_NAME
from megatron_powerflow.checkpoint.keeping import Keeping
from megatron_powerflow.checkpoint.saving import Saver
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.hf.live_weights import export_to_hf
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.together import on_main
from megatron_powerflow.prove.job import SAVED, Job, Part
from megatron_powerflow.prove.seen import Seen
from megatron_powerflow.prove.small_config import STEPS
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.rollout.rollout_files import step_file, write_rollouts
from megatron_powerflow.training.plan import Plan, make_plan, write_config
from megatron_powerflow.training.session import Session, build_session, from_whole_checkpoint
from megatron_powerflow.training.step import run_step, sampling_of_step
from megatron_powerflow.training.step_rollouts import step_rollouts

Note = Callable[[str], None]  # a phase begins


def run_part(part: Part, job: Job, launch: Launch, note: Note) -> None:
    """Make a part of the proof on this rank, and write what it has seen. Collective over the part's processes."""
    plan = make_plan(load_config(job.config_path(part)), launch.world_size)
    with initialized(plan.layout, launch, seed=plan.config.run.seed) as groups:
        note("loads its checkpoint" if part is Part.RESUMED else "loads the model")
        plan = from_whole_checkpoint(plan, groups, make_console(io.StringIO()))
        session = build_session(plan, groups)
        assert session.progress.step == (SAVED if part is Part.RESUMED else 0), "the checkpoint that was written"
        seen = Seen(plan, session)
        if part is Part.LAYOUT:
            note("draws responses")
            seen.drawn(_drawn(plan, session, 0))
        with _saver(plan, groups) as saver:
            for step in range(session.progress.step, STEPS):
                _make_step(step, part, job, plan, session, seen, note)
                if part is Part.LAYOUT and step + 1 == SAVED:
                    note("saves")
                    _save(plan, session, saver)
            saver.settle(wait=True)
        if part is Part.LAYOUT:
            note("exports")
            _export(plan, session)
        seen.write(job.seen(part))


def _make_step(step: int, part: Part, job: Job, plan: Plan, session: Session, seen: Seen, note: Note) -> None:
    """Make one step on the rollouts that the one process draws. What is compared of the first step is more."""
    if part is Part.ALONE:
        note(f"draws the rollouts of step {step + 1} of {STEPS}")
        rollouts = _drawn(plan, session, step)
        if step == 0:
            seen.drawn(rollouts)
        _write(rollouts, plan, session, job, step)
    # as in a run: the rollouts are by the policy that trains, unless the user's config replays others'
    replayed = replace(plan, replay_from=job.rollouts, sampled_by=job.sampled_by)
    prompts = _prompts(plan, step)
    if step == 0:
        note("scores the responses")
        seen.log_probs(step_rollouts(replayed, session, prompts, sampling_of_step(plan, step)))
    note(f"makes step {step + 1} of {STEPS}")
    seen.step(step, run_step(replayed, session, prompts, step))
    if step == 0:
        seen.gradients()


def _prompts(plan: Plan, step: int) -> Sequence[Prompt]:
    count = plan.config.rollout.prompts_per_step
    return plan.prompts[step * count : (step + 1) * count]


def _drawn(plan: Plan, session: Session, step: int) -> list[Rollout]:
    """Return this replica's share of a step's rollouts, drawn by the policy as it is. Collective."""
    return step_rollouts(plan, session, _prompts(plan, step), sampling_of_step(plan, step))


def _write(rollouts: list[Rollout], plan: Plan, session: Session, job: Job, step: int) -> None:
    vocab_size, temperature = plan.architecture.vocab_size, plan.config.rollout.temperature
    write_rollouts(step_file(job.rollouts, step), rollouts, step=step, vocab_size=vocab_size, temperature=temperature)


def _saver(plan: Plan, groups: Groups) -> Saver:
    return Saver(
        plan.run_folder,
        groups,
        companions=plan.hf_folder,
        keeping=Keeping(None),
        asynchronous=plan.config.checkpoint.asynchronous,
        say=lambda text: None,
    )


def _save(plan: Plan, session: Session, saver: Saver) -> None:
    """Begin a checkpoint, as a run does: where it is asynchronous, the next step goes on meanwhile. Collective."""

    def begin() -> None:
        plan.run_folder.mkdir(exist_ok=True)
        write_config(plan)
        plan.inputs.write(plan.run_folder)

    on_main(begin, session.groups)
    saver.save(session.trainable, replace(session.progress, step=SAVED), wait=False)


def _export(plan: Plan, session: Session) -> None:
    export_to_hf(
        session.trainable.chunks,
        plan.architecture,
        plan.family,
        session.groups,
        companions=plan.hf_folder,
        out=plan.run_folder / EXPORT_NAME,
        source=plan.run_folder,
    )
