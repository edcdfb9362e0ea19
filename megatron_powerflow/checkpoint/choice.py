"""Which checkpoint does a run continue? The one that `latest` names, or the newest that is whole, and says why.

Looked at here, on one process and in a moment: that every listed file is there, and the digests of small files. A large
file that was cut or changed is found by its digest when training starts (`whole.py`). Imports no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megatron_powerflow.checkpoint.digests import damage_of, read_sums
from megatron_powerflow.checkpoint.folder import CHECKPOINTS_NAME, LATEST_NAME, checkpoints_of
from megatron_powerflow.checkpoint.state import FORMAT, read_progress, read_proof
from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import ordinary

SMALL_BYTES = 2**20
DAMAGED_SUFFIX = ".damaged"


@dataclass(frozen=True, slots=True)
class Choice:
    """checkpoint: to continue from; None: the run begins at step 0. notices: what a user should know of that."""

    checkpoint: Path | None
    notices: tuple[str, ...] = ()


def choose(run: Path, wanted: str = "latest") -> Choice:
    """Return the checkpoint that a run in this folder continues.

    wanted: latest, or the name of one. Raises UserError where that one is not there or not whole, and where there are
    checkpoints of which none is whole: such a run does not begin anew unasked.
    """
    known = {path.name: path for path in checkpoints_of(run)}
    if wanted != "latest":
        if wanted not in known:
            raise UserError(f"{run}: no checkpoint {wanted}; there are {', '.join(known) or 'none'}")
        if flaw := flaw_of(known[wanted]):
            raise UserError(f"{known[wanted]}: {flaw}; name another one, or checkpoint.resume=latest")
        later = [name for name in known if step_of(known[name]) > step_of(known[wanted])]
        stay = f"; {', '.join(later)} stay until they are written again" if later else ""
        return Choice(known[wanted], (f"goes on from {wanted}, as checkpoint.resume asks{stay}",))
    named, wrong = _named(run)
    if named in known and (flaw := flaw_of(known[named])) is None:
        return Choice(known[named], _of_an_old_format(known[named]))
    if named in known:
        return _earlier_or_refuse(run, known[named], f"{named}, which {LATEST_NAME} names, is not whole: {flaw}")
    if known:
        newest = newest_whole(run)
        if newest is None:
            raise UserError([f"{run / CHECKPOINTS_NAME / LATEST_NAME} {wrong}", *_nothing_whole(run)])
        notice = f"{CHECKPOINTS_NAME}/{LATEST_NAME} {wrong}: continues from the newest whole checkpoint, {newest.name}"
        return Choice(newest, (notice, *_of_an_old_format(newest)))
    if named or (damaged := set_aside(run)):
        what = f"{LATEST_NAME} names {named}" if named else f"there are only {', '.join(damaged)}"
        raise UserError(
            f"{run / CHECKPOINTS_NAME}: {what}, and no checkpoint is there that could be continued; put one back, or "
            "name a new run.output_dir to begin anew"
        )
    return Choice(None)


def newest_whole(run: Path, before: int | None = None) -> Path | None:
    """Return the newest checkpoint, of a step before `before`, that is whole by a quick look and sound."""
    for path in reversed(checkpoints_of(run)):
        if (before is None or step_of(path) < before) and flaw_of(path) is None and is_sound(path):
            return path
    return None


def flaw_of(checkpoint: Path) -> str | None:
    """Return what a quick look finds wrong with a checkpoint; None where it looks whole."""
    try:
        small = [name for name in read_sums(checkpoint) if _size(checkpoint / name) <= SMALL_BYTES]
        if damage := damage_of(checkpoint, small):
            return ", ".join(damage)
        read_progress(checkpoint)
        read_proof(checkpoint)
    except (UserError, OSError) as error:
        return str(error)
    return None


def is_sound(checkpoint: Path) -> bool:
    """Return whether its weights are finite and no step was being skipped when it was made. Raises UserError."""
    proof = read_proof(checkpoint)
    return read_progress(checkpoint).skipped_in_a_row == 0 and (proof is None or proof.is_finite)


def set_aside(run: Path) -> list[str]:
    """Return the names of checkpoints that were found damaged when an earlier start read them."""
    pattern = rf"step_\d{{6,}}{re.escape(DAMAGED_SUFFIX)}(\.\d+)?"
    return sorted(path.name for path in (run / CHECKPOINTS_NAME).glob("step_*") if re.fullmatch(pattern, path.name))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def latest_of(run: Path) -> str:
    """Return the name of the checkpoint that `latest` names, whether it is there or not; "" where it names none."""
    return _named(run)[0]


def _named(run: Path) -> tuple[str, str]:
    """The checkpoint that `latest` names, or nothing; and what is wrong with it, should that one not be there."""
    pointer = run / CHECKPOINTS_NAME / LATEST_NAME
    try:
        name = ordinary(pointer).read_bytes()[:200].decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return "", "is missing"
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    if not re.fullmatch(r"step_\d{6,}", name):
        return "", "names no checkpoint"
    return name, f"names {name}, which is not there"


def _earlier_or_refuse(run: Path, damaged: Path, why: str) -> Choice:
    earlier = newest_whole(run, before=step_of(damaged))
    if earlier is None:
        raise UserError([why, *_nothing_whole(run)])
    return Choice(earlier, (f"{why}; continues from {earlier.name}", *_of_an_old_format(earlier)))


def _nothing_whole(run: Path) -> list[str]:
    """What to do where no checkpoint can be taken: each with its flaw."""
    flaws = [f"{path.name}: {flaw}" for path in checkpoints_of(run) if (flaw := flaw_of(path))]
    others = [path.name for path in checkpoints_of(run) if flaw_of(path) is None]
    advice = f"; checkpoint.resume={others[-1]} takes a checkpoint that is whole" if others else ""
    return [
        *flaws,
        f"{run}: has no checkpoint that could be taken instead{advice}; else put files back from a copy, or name a new "
        "run.output_dir to begin anew",
    ]


def _of_an_old_format(checkpoint: Path) -> tuple[str, ...]:
    if read_proof(checkpoint) is not None:
        return ()
    return (
        f"{checkpoint.name} is of format 1, before {FORMAT}: its files are compared with their digests, and what is "
        "loaded of them with nothing",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
