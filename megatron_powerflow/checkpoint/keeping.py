"""Which checkpoints may go when a new one is there? Numbers only.

A checkpoint is sound when its weights are finite and no step was being skipped as it was made. Only sound ones count as
kept: a run that diverges does not push its good checkpoints out with bad ones.

Left out: removing them (`saving.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Keeping:
    """keep: how many of the newest sound checkpoints stay; None: all. keep_every: those of every so many-th step stay
    besides; None: no others."""

    keep: int | None
    keep_every: int | None = None


def steps_to_remove(sound: Mapping[int, bool], *, saved: int, latest: int | None, keeping: Keeping) -> list[int]:
    """Return the steps whose checkpoints go, oldest first.

    sound: of each checkpoint that is there, by its step, whether it is whole and sound. saved: the step just written.
    latest: the step that `latest` names, if it does. Neither of the two goes, nor a later step than the saved one: a
    run that went back to an earlier checkpoint does not count or remove those of its other course. Nothing goes where
    the checkpoint just written is not sound.
    """
    if keeping.keep is None or not sound.get(saved, False):
        return []
    counted = sorted((step for step, good in sound.items() if good and step <= saved), reverse=True)
    oldest_kept = counted[: keeping.keep][-1]
    return [
        step
        for step in sorted(sound)
        if step < oldest_kept
        and step not in (saved, latest)
        and not (keeping.keep_every is not None and step % keeping.keep_every == 0)
    ]
