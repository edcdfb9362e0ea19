"""Which weights sampled the rollouts of a step, and what becomes of the importance weights w and v?

Three policies have a say, and log-probs of their own: the sampler (S_sampler, `rollout_log_probs`), the trainer at the
start of the step (S_old, `old_log_probs`), the policy as it is (S). w = S / S_old, v = S_old / S_sampler.

    one update                      S_old = S: w = 1 exactly, and objective.ratio is none
    several updates                 S_old is scored by the trainer before the first; w moves from the second on
    replay of another policy's      S_old = the saved sampler's log-probs, for every update: w is of both steps at once
        with sampler_ratio          S_old is scored by the trainer; v is of the saved log-probs
    replay of this very run         as if sampled: w made of saved log-probs would differ from 1 by the rounding of
                                    kernels, and the replay would not be the run

Left out: the arithmetic (`objective/`), reading rollouts (`rollout/rollout_files.py`). Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

from megatron_powerflow.checkpoint.folder import CONFIG_NAME
from megatron_powerflow.config import Config, ObjectiveSection
from megatron_powerflow.config_file import load_recorded_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.objective.presets import EntropyMinimum, PolicyGradient
from megatron_powerflow.records import Rollout
from megatron_powerflow.training.inputs import read_inputs

_WEIGHT_KEYS = ("ratio", "clip", "clip_epsilon")


class SampledBy(StrEnum):
    """Whose weights drew the rollouts of a step, by whatever program, and what S_old is of.

    OWN: those that the step starts with. OLDER: of this run, those of earlier steps (`Rollout.weight_versions` says
    which). ANOTHER: another policy's. Of these three the trainer at the start of the step scores S_old. SAVED: another
    policy's, too, and S_old are its saved log-probs, so that w leads from the sampler to the policy in one go.
    """

    OWN = "own"
    OLDER = "older"
    ANOTHER = "another"
    SAVED = "saved"

    @property
    def old_is_scored(self) -> bool:
        """Whether the trainer at the start of the step says what S_old is."""
        return self is not SampledBy.SAVED

    @property
    def is_this_run(self) -> bool:
        """Whether `Rollout.weight_versions` counts steps of this run."""
        return self in (SampledBy.OWN, SampledBy.OLDER)


def who_sampled(config: Config, *, own: bool) -> SampledBy:
    """Return whose weights draw the rollouts of each step.

    own: those that the step starts with, sampled or replayed from a run of this very config.
    """
    if own:
        is_older = config.rollout.steps_ahead or config.rollout.buffer_steps
        return SampledBy.OLDER if is_older else SampledBy.OWN
    return SampledBy.SAVED if config.objective.sampler_ratio == "none" else SampledBy.ANOTHER


def lag_of(rollout: Rollout, step: int, sampled_by: SampledBy) -> tuple[float, float, float]:
    """Return LAG_COLUMNS of a rollout that a step trains on; NaN where the weights are not of this run.

    step: counted from 0.
    """
    if not sampled_by.is_this_run:
        return (math.nan,) * 3
    lags = [(step - version, end - start) for version, start, end in rollout.weight_versions]
    assert all(lag >= 0 for lag, _ in lags), f"weights of a later step than {step}: {rollout.weight_versions}"
    assert sampled_by is SampledBy.OLDER or not any(lag for lag, _ in lags), "older weights: the plan must know of them"
    num_versions = len({version for version, _, _ in rollout.weight_versions}) or 1
    return float(sum(lag * size for lag, size in lags)), float(max((lag for lag, _ in lags), default=0)), num_versions


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
    if any(not name.startswith("datasets/") for name in moved) or _trains(theirs) != _trains(config):
        return False
    return not _holds_older_weights(replay_from)  # rollout.steps_ahead may have changed on the way


def _holds_older_weights(folder: Path) -> bool:
    """Whether any saved response is by other weights than those of its step, which its line then says."""
    return any(b'"weight_versions"' in path.read_bytes() for path in folder.glob("step_*.jsonl"))


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
        "older": (config.rollout.steps_ahead, config.rollout.buffer_steps),  # responses of other weights than a step's
        "num_steps": config.run.num_steps if config.optimizer.lr_decay != "constant" else None,
    }


def objective_of(config: Config, sampled_by: SampledBy) -> ObjectiveSection:
    """Return the objective that is trained.

    One update of replayed rollouts that are the policy's own has no ratio, as the run that saved them had none by
    default; everything else is as the config has it.
    """
    own = sampled_by is SampledBy.OWN
    if own and config.rollout.replay is not None and config.optimizer.updates_per_rollout == 1:
        return config.objective.model_copy(update={"ratio": "none", "clip": None, "clip_epsilon": None})
    return config.objective


def weight_lines(config: Config, sampled_by: SampledBy) -> list[str]:
    """Return the lines of `powerflow check` that say what w and v are, or that they are dropped."""
    v = _sampler_weight_line(config, sampled_by)
    return [f"weight    {_weight_words(config, sampled_by)}", *([f"          {v}"] if v else [])]


def _weight_words(config: Config, sampled_by: SampledBy) -> str:
    objective, several = config.objective, config.optimizer.updates_per_rollout > 1
    if config.rollout.buffer_steps:
        return (
            f"w is of the policy at the start of the step, ratio {objective.ratio}; the rollouts of the last "
            f"{config.rollout.buffer_steps} steps, by earlier policies, weigh "
            + ("by v, below" if objective.sampler_ratio != "none" else "as much as the step's own")
        )
    if sampled_by is SampledBy.OWN and not several:
        return "w = 1: each update is of rollouts by the policy that it trains"
    if sampled_by.old_is_scored and not several:
        return "w = 1: S_old is scored with the weights that a step starts with, and its one update trains these"
    why = "the later updates of a step are of rollouts by the policy before them"
    if sampled_by is SampledBy.OLDER or sampled_by is SampledBy.ANOTHER:
        why = "the later updates of a step find other weights than it started with"
    if sampled_by is SampledBy.SAVED:
        why = "the replayed rollouts are another policy's"
    if objective.ratio == "none":
        return f"w is DROPPED (objective.ratio=none), and {why}: the update is not Eq. 10's"
    source = "scored before the first update" if sampled_by.old_is_scored else "of the saved log-probs"
    sides = "at most 1 +" if objective.clip == "upper" else "1 +-"
    return (
        f"w = exp(S - S_old), ratio {objective.ratio}, clipped to {sides} {objective.clip_epsilon:g}, S_old "
        f"{source}: {why}"
    )


def _sampler_weight_line(config: Config, sampled_by: SampledBy) -> str:
    """Return what v is; "" where there is none and the weights that sampled are those that train."""
    objective, older = config.objective, "the rollouts are by older weights of this run"
    if objective.sampler_ratio == "none":
        return _without_sampler_weight(objective) if sampled_by is SampledBy.OLDER else ""
    formula = {
        "seq": "exp(S_old - S_sampler)",
        "seq_mean": "exp((S_old - S_sampler) / n)",
        "token": "p_old / p_sampler of each token",
    }[objective.sampler_ratio]
    why = {
        SampledBy.OWN: "sampler and trainer have the same weights, and v is what their kernels and dtypes differ by",
        SampledBy.OLDER: older,
        SampledBy.ANOTHER: "the replayed rollouts are another policy's",
    }[sampled_by]
    return f"v = min({formula}, {objective.sampler_ratio_cap:g}), S_old scored with a step's first weights: {why}"


def _without_sampler_weight(objective: ObjectiveSection) -> str:
    """Return what becomes of an objective that trains on responses of older weights without v: docs/pages/lag.md."""
    form, dropped = objective.form, "v is DROPPED (objective.sampler_ratio=none)"
    if isinstance(form, EntropyMinimum):
        return "v does not exist: the entropy is lowered where older weights came by; keep the lag small"
    if isinstance(form, PolicyGradient):
        if form.powers:
            return "v is 1: the optimum is the same, whoever sampled"
        return f"{dropped}: which of its best policies it reaches depends on the lag; set objective.sampler_ratio=token"
    if form.per_token or objective.reward_advantage or objective.task_reward == "majority":
        return (
            f"{dropped}: no policy makes every residual 0 here, so where training ends depends on who sampled; set "
            "objective.sampler_ratio=seq, or keep the lag small"
        )
    if objective.log_z == "scalar" or objective.truncated == "drop":
        why = "log Z' of one number" if objective.log_z == "scalar" else "objective.truncated=drop"
        return f"v is 1; with {why} where training ends depends on who sampled, with lag or without"
    return "v is 1: the optimum is the same, whoever sampled"


def temperature_lines(config: Config) -> list[str]:
    """Return what a rollout.temperature other than 1 does to the target and to serving, as lines; [] at 1."""
    t = config.rollout.temperature
    if t == 1.0:
        return []
    return [
        f"T         sampler, policy and reference are softmax(logits / {t:g}): the target is the power of the base",
        f"          model at that temperature, and what is trained must be served at temperature {t:g}, not at 1",
    ]
