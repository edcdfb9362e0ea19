"""Which checkpoint does a run continue, and is its folder this run's at all? By its config, key by key.

Left out: what was read when it began, by content (`inputs.py`); which checkpoints are whole (`checkpoint/choice.py`).
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_powerflow.checkpoint.choice import choose, set_aside
from megatron_powerflow.checkpoint.first_files import JOURNALS, holds_a_run, holds_a_step, not_ours
from megatron_powerflow.checkpoint.folder import CONFIG_NAME, INPUTS_NAME, POLICY_NAME, checkpoints_of
from megatron_powerflow.checkpoint.megatron_version import refuse_newer
from megatron_powerflow.config import Config
from megatron_powerflow.config_file import config_keys, load_recorded_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import own_file

# What may be another one when a run is continued: keys, or whole sections.
CHANGEABLE = frozenset(
    {"run.name", "run.num_steps", "run.export", "run.stop_on_alarm", "run.stop_at_alpha"}
    | {"run.stop_before", "run.hang_seconds", "run.deterministic"}
    | {
        "model.reference",
        "model.reference_store",
        "model.recompute",
        "model.recompute_modules",
        "rollout.max_concurrent_rows",
        "rollout.save",
        "rollout.engine",
        "rollout.vllm",
        "rollout.steps_ahead",
        "rollout.in_flight_updates",
    }
    | {"optimizer.lr", "optimizer.log_z_lr", "optimizer.min_lr", "optimizer.lr_decay", "optimizer.warmup_steps"}
    | {"optimizer.clip_grad", "optimizer.distributed", "optimizer.max_skipped_steps"}
    | {"alarm", "parallel", "checkpoint", "evaluation", "metrics"}
)
# Compared by what is read under them, elsewhere (`inputs.py`), where that was noted.
BY_CONTENT = frozenset({"model.hf_path", "prompts.path", "rollout.replay"})
# Why the others may not: of a key, else of its section.
WHY_NOT = {
    "model": "the weights were trained from that model, and it is the reference of their target",
    "precision": "the steps so far were made in that number format",
    "prompts": "the run's place in its prompts counts those that this setting makes",
    "rollout": "the responses so far were drawn with it",
    "rollout.prompts_per_step": "a step is this many prompts, and the run's place in its prompts is counted in them",
    "rollout.buffer_steps": "the steps so far were trained on the rollouts of another number of steps",
    "rollout.replay": "the steps so far were of another source of rollouts",
    "objective": "it says what the run is trained towards, and the steps so far went elsewhere",
    "objective.log_z": "another log Z' has other state, which this run's checkpoints do not hold",
    "optimizer": "Adam's moments in the checkpoint were gathered with it",
    "optimizer.updates_per_rollout": "it says how often a step's rollouts are used, and with that the step's meaning",
    "run.seed": "prompts and responses of the steps to come are drawn from it, and would repeat or skip some",
}
# Not even by --override-resume: what is saved cannot be continued so.
NEVER = {"precision.dtype": "the saved weights have another width; export the policy, and begin a run from that"}


@dataclass(frozen=True, slots=True)
class Change:
    """A key that is another one than at the start before."""

    key: str
    before: Any
    now: Any

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Resume:
    """checkpoint: to continue from; None: the run begins. notices: what a user should know of that. changed: what is
    not as at the start before. goes_back: the config names this checkpoint, and the start before did not.
    micro_batch_size: that of the run, where it pads and the config leaves open how rollouts become batches: up to
    0.2.0 four padded rollouts were the default, and a run goes on with them."""

    checkpoint: Path | None = None
    notices: tuple[str, ...] = ()
    changed: tuple[Change, ...] = ()
    goes_back: bool = False
    micro_batch_size: int | None = None

    def batched_as_before(self, config: Config) -> Config:
        """The config, with the micro-batches of the run where it does not say which."""
        if self.micro_batch_size is None:
            return config
        section = config.parallel.model_copy(update={"micro_batch_size": self.micro_batch_size})
        return config.model_copy(update={"parallel": section})


def find_resume(config: Config, overridden: Sequence[str] = ()) -> Resume:
    """What the run continues. Raises UserError when the folder is another run's, or no run's.

    overridden: keys that may have changed although they usually may not. A folder in which a start was killed before
    its first step is no run's yet, whatever its settings were.
    """
    refuse_unknown_keys(overridden)
    folder = Path(config.run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.output_dir={str(folder)!r} is a file; name a folder")
    if not folder.is_dir() or not ((held := not_ours(folder)) or holds_a_step(folder)):
        return Resume()
    theirs = _config_of_run(folder, held)
    kept = _kept_micro_batch_size(theirs, config)
    config = Resume(micro_batch_size=kept).batched_as_before(config)
    changed = changes_between(theirs, config)
    _refuse(folder, changed, overridden, by_content=(folder / INPUTS_NAME).is_file())
    _refuse_foreign_journals(folder)
    if config.checkpoint.resume == "never":
        if present := [*(path.name for path in checkpoints_of(folder)), *set_aside(folder)]:
            raise UserError(
                f"run.output_dir={str(folder)!r} holds {present[-1]} and checkpoint.resume=never; "
                "name a new folder, or continue with checkpoint.resume=latest"
            )
        return Resume(notices=(*_anew(folder), *_padded(kept)), changed=changed, micro_batch_size=kept)
    # the start before has gone back to this one already; since then `latest` is of the course that began there
    goes_back = config.checkpoint.resume not in ("latest", theirs.checkpoint.resume)
    choice = choose(folder, config.checkpoint.resume if goes_back else "latest")
    if choice.checkpoint is not None:
        refuse_newer(choice.checkpoint / POLICY_NAME)
    notices = choice.notices or (_anew(folder) if choice.checkpoint is None else ())
    return Resume(choice.checkpoint, (*notices, *_padded(kept)), changed, goes_back, kept)


def _kept_micro_batch_size(theirs: Config, ours: Config) -> int | None:
    """The run's micro_batch_size, where our config leaves it open how rollouts become micro-batches."""
    is_open = ours.parallel.micro_batch_size is None and ours.parallel.max_tokens_per_micro_batch is None
    return theirs.parallel.micro_batch_size if is_open else None


def _padded(size: int | None) -> tuple[str, ...]:
    if size is None:
        return ()
    return (
        f"the run goes on with parallel.micro_batch_size={size}, as it began; new runs pack: for that give "
        "parallel.max_tokens_per_micro_batch a number of tokens",
    )


def _config_of_run(folder: Path, held: Sequence[str]) -> Config:
    """The config that the run has recorded. held: the files that make the folder another's if it is no run's."""
    path = folder / CONFIG_NAME
    copies = [each / CONFIG_NAME for each in checkpoints_of(folder) if (each / CONFIG_NAME).is_file()]
    put_back = f"; a checkpoint has a copy: {shlex.join(['cp', str(copies[-1]), str(path)])}" if copies else ""
    if not holds_a_run(folder):
        if copies:
            raise UserError(f"{path}: gone, or not what the run has written{put_back}")
        raise UserError(
            f"run.output_dir={str(folder)!r} holds other files and no run ({', '.join(held[:3])}); name a new folder"
        )
    try:
        return load_recorded_config(path)
    except UserError as error:
        *others, last = error.violations
        raise UserError([*others, last + put_back]) from None


def changes_between(theirs: Config, ours: Config) -> tuple[Change, ...]:
    """Every key whose value differs, in the order of the sections; where the folder lies does not count."""
    before, now = theirs.model_dump(), ours.model_dump()
    return tuple(
        Change(f"{section}.{key}", before[section][key], value)
        for section, values in now.items()
        for key, value in values.items()
        if before[section][key] != value and (section, key) != ("run", "output_dir")
    )


def may_change(key: str) -> bool:
    return key in CHANGEABLE or key.split(".")[0] in CHANGEABLE


def why_not(key: str) -> str:
    """Why a key may not change when a run goes on."""
    return NEVER.get(key) or WHY_NOT.get(key) or WHY_NOT[key.split(".")[0]]


def refuse_unknown_keys(overridden: Sequence[str]) -> None:
    """Raises UserError for each that is no key, may change anyway, or may not even so."""
    known = config_keys()
    violations = []
    for key in overridden:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            violations.append(f"--override-resume {key}: no such key{meant}")
        elif may_change(key) and key != "evaluation.prompts":  # whose content may not
            violations.append(f"--override-resume {key}: this key may change anyway; leave the option out")
        elif key in NEVER:
            violations.append(f"--override-resume {key}: {NEVER[key]}")
    if violations:
        raise UserError(violations)


def _refuse(folder: Path, changed: Sequence[Change], overridden: Sequence[str], *, by_content: bool) -> None:
    elsewhere = BY_CONTENT if by_content else frozenset()
    differences = [
        f"its {change.key} is {change.before!r}, not {change.now!r}: {why_not(change.key)}"
        for change in changed
        if not may_change(change.key) and change.key not in elsewhere and change.key not in overridden
    ]
    if differences:
        raise UserError(
            [f"run.output_dir={str(folder)!r} is the folder of another run: {item}" for item in differences]
            + [
                "name a new run.output_dir, or take these keys back; --override-resume KEY lets a run go on with "
                "another value of that key"
            ]
        )


def _anew(folder: Path) -> tuple[str, ...]:
    if not holds_a_step(folder):
        return ()
    return (f"{folder} holds steps of a run and no checkpoint: it starts anew from step 0, and writes them again",)


def _refuse_foreign_journals(folder: Path) -> None:
    """Before a GPU is held: the run would append to each of them."""
    violations = []
    for name in JOURNALS:
        try:
            own_file(folder / name)
        except OSError as error:
            violations.append(f"{error.filename}: {error.strerror}; take it away, or put the run's own file there")
    if violations:
        raise UserError(violations)
