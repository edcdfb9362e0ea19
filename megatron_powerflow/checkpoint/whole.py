"""Is the checkpoint to continue from whole, to the last byte? All ranks read it, and take the same one.

One that is damaged is set aside under another name and stays on the disk: nothing counts it, and nobody loads it by
mistake. Left out: what a quick look says (`choice.py`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from megatron_powerflow.checkpoint.choice import DAMAGED_SUFFIX, newest_whole, step_of
from megatron_powerflow.checkpoint.digests import damage_of_share
from megatron_powerflow.checkpoint.folder import LATEST_NAME
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import broadcast_object, on_main, raise_together
from megatron_powerflow.whole_files import sync, write_file


def whole_checkpoint(first: Path, groups: Groups, *, may_go_back: bool, say: Callable[[str], None]) -> Path:
    """Return `first`, or the newest one before it that is whole. Collective; the same on every rank.

    may_go_back: False where the user named this one. say: prints, on the main rank, what was found. Raises UserError
    where none is whole, and where a rank does not see the files that the main rank sees.
    """
    checkpoint = first
    run = first.parent.parent
    while damage := _damage(checkpoint, groups):
        if not may_go_back:
            raise UserError(f"{checkpoint}: {damage}; name another one, or checkpoint.resume=latest")
        aside = on_main(partial(set_aside_as, checkpoint), groups)
        earlier = on_main(partial(newest_whole, run, before=step_of(checkpoint)), groups)
        if earlier is None:
            raise UserError(
                f"{checkpoint}: {damage}; it is now {aside.name}, and no earlier checkpoint is whole. Put its files "
                "back from a copy and give it its name back, or name a new run.output_dir to begin anew"
            )
        say(
            f"{checkpoint.name} is damaged ({damage}); it stays as {aside.name}, and the run continues from "
            f"{earlier.name}"
        )
        checkpoint = earlier
    return checkpoint


def point_at(checkpoint: Path) -> None:
    """Make a checkpoint `latest`. Raises OSError."""
    write_file(checkpoint.with_name(LATEST_NAME), checkpoint.name + "\n")


def set_aside_as(checkpoint: Path) -> Path:
    """Give a damaged checkpoint a name that is no checkpoint's; returns it. Raises OSError."""
    name, number = checkpoint.name + DAMAGED_SUFFIX, 1
    while checkpoint.with_name(name).exists():
        number += 1
        name = f"{checkpoint.name}{DAMAGED_SUFFIX}.{number}"
    aside = checkpoint.rename(checkpoint.with_name(name))
    sync(checkpoint.parent)
    return aside


def _damage(checkpoint: Path, groups: Groups) -> str:
    """What is wrong with the files, every rank reading a share of them; empty where nothing is."""
    listing = broadcast_object(_sizes(checkpoint) if groups.is_main else None, groups)
    mine = _sizes(checkpoint)
    failure = None
    if mine != listing:
        differing = sorted(name for name in mine.keys() | listing.keys() if mine.get(name) != listing.get(name))
        failure = UserError(
            f"{checkpoint}: rank {groups.rank} on {socket.gethostname()} does not see the files that rank 0 sees "
            f"({', '.join(differing[:3])}); mount the same file system on every node"
        )
    raise_together(failure, str, groups)
    found: list[str] = []
    try:
        found = damage_of_share(checkpoint, groups.rank, groups.world_size)
    except (UserError, OSError) as error:
        found = [str(error)]
    everyone: list[list[str]] = [[]] * groups.world_size
    dist.all_gather_object(everyone, found, group=groups.control)
    return ", ".join(dict.fromkeys(text for texts in everyone for text in texts))


def _sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of each file, by its relative path."""
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()
    }
