"""Which policy sampled the rollouts of a step, and what becomes of the importance weight w of Equation 10?

    one update, own rollouts        S_old = S: w = 1 exactly, and objective.ratio is none
    several updates                 S_old is scored by the trainer before the first; w moves from the second on
    replay of another policy's      S_old = the saved sampler's log-probs, for every update
    replay of this very run         as if sampled: w made of saved log-probs would differ from 1 by the rounding of
                                    kernels, and the replay would not be the run

Left out: the arithmetic (`objective/`), reading rollouts (`rollout/rollout_files.py`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_powerflow.checkpoint.folder import CONFIG_NAME
from megatron_powerflow.config import Config, ObjectiveSection
from megatron_powerflow.config_file import load_recorded_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.training.inputs import read_inputs

_WEIGHT_KEYS = ("ratio", "clip", "clip_epsilon")


def is_own_run(config: Config, replay_from: Path, *, revisions: Mapping[str, str] | None = None) -> bool:
    """Whether the run that saved these rollouts trained as `config` says, so that its policy at each step is ours.

    replay_from: RUN/rollouts. What is compared is what the weights depend on beside the rollouts; layouts and
    micro-batches change them by rounding only. Without a config that can be read they are another policy's. revisions:
    of the hub, by name; a model of another commit is another policy.
    """
    path = replay_from.parent / CONFIG_NAME
    if not path.is_file():
        return False
    try:
        theirs, inputs = load_recorded_config(path), read_inputs(path.parent)
    except UserError:
        return False
    before = inputs.revisions if inputs else {}
    moved = {name for name, revision in (revisions or {}).items() if before.get(name, revision) != revision}
    return all(name.startswith("datasets/") for name in moved) and _trains(theirs) == _trains(config)


def _trains(config: Config) -> dict:
    """Return what the weights of every step follow from, given the rollouts."""
    objective = config.objective.model_dump()
    if config.optimizer.updates_per_rollout == 1:  # w = 1, whatever it is made of
        objective = {key: value for key, value in objective.items() if key not in _WEIGHT_KEYS}
    return {
        "model": str(Path(config.model.hf_path).resolve()),
        "precision": config.precision.model_dump(),
        "objective": objective,
        "optimizer": config.optimizer.model_dump(exclude={"distributed", "max_skipped_steps"}),
        "seed": config.run.seed,  # of the log Z' head
        "buffer_steps": config.rollout.buffer_steps,
        "num_steps": config.run.num_steps if config.optimizer.lr_decay != "constant" else None,
    }


def objective_of(config: Config, on_policy: bool) -> ObjectiveSection:
    """Return the objective that is trained.

    One update of replayed rollouts that are the policy's own has no ratio, as the run that saved them had none by
    default; everything else is as the config has it.
    """
    if on_policy and config.rollout.replay is not None and config.optimizer.updates_per_rollout == 1:
        return config.objective.model_copy(update={"ratio": "none", "clip": None, "clip_epsilon": None})
    return config.objective


def weight_line(config: Config, on_policy: bool) -> str:
    """Return the line of `powerflow check` that says what w is, or that it is dropped."""
    objective, several = config.objective, config.optimizer.updates_per_rollout > 1
    if config.rollout.buffer_steps:
        return (
            f"weight    w is of the policy at the start of the step, ratio {objective.ratio}; the rollouts of the "
            f"last {config.rollout.buffer_steps} steps, by earlier policies, weigh as much as the step's own"
        )
    if on_policy and not several:
        return "weight    w = 1: each update is of rollouts by the policy that it trains"
    why = "the later updates of a step are of rollouts by the policy before them"
    if not on_policy:
        why = "the replayed rollouts are another policy's"
    if objective.ratio == "none":
        return f"weight    w is DROPPED (objective.ratio=none), and {why}: the update is not Eq. 10's"
    source = "scored before the first update" if on_policy else "of the saved log-probs"
    sides = "at most 1 +" if objective.clip == "upper" else "1 +-"
    return (
        f"weight    w = exp(S - S_old), ratio {objective.ratio}, clipped to {sides} {objective.clip_epsilon:g}, S_old "
        f"{source}: {why}"
    )


def temperature_lines(config: Config) -> list[str]:
    """Return what a rollout.temperature other than 1 does to the target and to serving, as lines; [] at 1."""
    t = config.rollout.temperature
    if t == 1.0:
        return []
    return [
        f"T         sampler, policy and reference are softmax(logits / {t:g}): the target is the power of the base",
        f"          model at that temperature, and what is trained must be served at temperature {t:g}, not at 1",
    ]
