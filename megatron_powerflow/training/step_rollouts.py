"""Where do a step's rollouts come from? The engine, the file of a step saved before, or another run's files.

    rollout.replay=DIR     DIR/step_*.jsonl, and no engine
    rollout.save=true      RUN/rollouts/step_*.jsonl where a run that broke off had this step's rollouts in hand already
    otherwise              the engine; with rollout.save=true also into that file, before anything is made of them

In sampling the context-parallel ranks of a replica are replicas of their own: they divide its prompts among them.

Left out: the format (`rollout/rollout_files.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, broadcast_object, raise_together
from megatron_powerflow.records import Prompt, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import ProgressCallback
from megatron_powerflow.rollout.rollout_files import (
    ROLLOUTS_NAME,
    read_rollouts,
    step_file,
    within_lag,
    write_rollouts,
)
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.rollout_exchange import over_samplers, to_main
from megatron_powerflow.training.session import Session


def step_rollouts(
    plan: Plan,
    session: Session,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    progress: ProgressCallback | None = None,
) -> list[Rollout]:
    """Return the rollouts of this replica's share of the step's prompts, alike on all its ranks.

    They are ordered by slot, then response. prompts: of the whole step. Collective over the run. Raises UserError when
    a saved file is damaged, or cannot be written.
    """
    groups, step = session.groups, sampling.step
    if plan.replay_from is not None:
        return _share(read_rollouts(step_file(plan.replay_from, step), plan.architecture.vocab_size), plan, groups)
    own_file = step_file(plan.run_folder / ROLLOUTS_NAME, step)
    saved = (
        plan.config.rollout.save and not plan.serves
    )  # servers' answers are in hand as they come (serving/ledger.py)
    if saved and broadcast_object(groups.is_main and _holds(own_file, prompts, plan, step), groups):
        return _share(read_rollouts(own_file, plan.architecture.vocab_size), plan, groups)
    share = _share_to_sample(prompts, plan, groups)
    asked = share or plan.serves  # of servers all ask together
    rollouts = over_samplers(session.engine.generate(share, sampling, progress) if asked else [], groups)
    if plan.config.rollout.save:
        _save(own_file, to_main(rollouts, groups), plan, groups, step)
    return rollouts


def begin_rollouts(plan: Plan, session: Session, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
    """Have the engine draw a later step's rollouts while this one trains. Collective over the run."""
    session.engine.begin(_share_to_sample(prompts, plan, session.groups), sampling)


def _share_to_sample(prompts: Sequence[Prompt], plan: Plan, groups: Groups) -> list[tuple[int, Prompt]]:
    """The (slot, prompt) pairs of this sampler: of its replica's share, as a context-parallel rank divides it."""
    return plan.share_of(prompts, groups.dp_rank)[groups.cp_rank :: groups.cp_size]


def saved_rollouts(plan: Plan, groups: Groups, step: int) -> list[Rollout]:
    """Return this replica's share of the rollouts that this run saved at an earlier step, alike on all its ranks.

    Raises UserError where the file is damaged or not there.
    """
    return _share(
        read_rollouts(step_file(plan.run_folder / ROLLOUTS_NAME, step), plan.architecture.vocab_size), plan, groups
    )


def _share(rollouts: Sequence[Rollout], plan: Plan, groups: Groups) -> list[Rollout]:
    """Return those of the slots that `Plan.share_of` gives this data-parallel rank."""
    slots = {slot for slot, _ in plan.share_of(range(plan.config.rollout.prompts_per_step), groups.dp_rank)}
    return [rollout for rollout in rollouts if rollout.slot in slots]


def _holds(path: Path, prompts: Sequence[Prompt], plan: Plan, step: int) -> bool:
    """Whether a try that broke off has saved this step's rollouts: whole, and of these prompts."""
    if not path.is_file():
        return False
    try:
        rollouts = read_rollouts(path, plan.architecture.vocab_size)
    except UserError:
        return False  # sampled and written anew
    size = plan.config.rollout.responses_per_prompt
    ours = [rollout.prompt for rollout in rollouts] == [prompt for prompt in prompts for _ in range(size)]
    return ours and all(within_lag(rollout, step, plan.config.rollout.steps_ahead, mixed=False) for rollout in rollouts)


def _save(path: Path, rollouts: Sequence[Rollout], plan: Plan, groups: Groups, step: int) -> None:
    """Write the step's rollouts, which the main rank has, and raise its UserError everywhere. Collective."""

    def write() -> None:
        write_rollouts(
            path,
            rollouts,
            step=step,
            vocab_size=plan.architecture.vocab_size,
            temperature=plan.config.rollout.temperature,
        )

    raise_together(
        attempt(write, OSError) if groups.is_main else None,
        lambda text: f"{path}: the rollouts could not be written ({text}); free space on that disk and start again",
        groups,
    )
