"""Whose is a run's folder while a run goes on, and what is left of a start that is refused? Nothing.

Left out: the lock itself (`parallel/owner.py`), which files are the first (`checkpoint/first_files.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_powerflow.checkpoint.first_files import remove_cut_off_files, remove_first_files
from megatron_powerflow.checkpoint.folder import LOCK_NAME, STOP_NAME
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.owner import Owner, held_by_another
from megatron_powerflow.training.plan import Plan, write_config
from megatron_powerflow.training.resume import find_resume


@contextmanager
def run_folder(plan: Plan) -> Iterator[Owner]:
    """Yield the owner of the run's folder, which has yet to take it; the folder is free again at the end.

    A start that ends with a UserError before its first step removes what it wrote.
    """
    folder = plan.run_folder
    with Owner(folder, folder / LOCK_NAME, "powerflow train") as owner:
        try:
            yield owner
        except UserError:
            with contextlib.suppress(OSError):  # a disk that refuses that, too: the first error is the one to tell
                if owner.holds():
                    remove_first_files(folder)
            raise


def take_run_folder(plan: Plan, owner: Owner) -> None:
    """Become the folder's owner, before anything is written in it. For the main rank.

    Raises UserError where another process holds it, or held it since the plan was made and went on with the run.
    """
    owner.take()
    newest = find_resume(plan.config, plan.overridden).checkpoint
    if newest != plan.resume_from:
        raise UserError(
            f"{plan.run_folder}: another process went on with this run, to {newest.name if newest else 'nothing'}, "
            "while this one started; start again"
        )
    if newest is None:
        # of a start that was killed, perhaps with other settings
        remove_first_files(plan.run_folder, keep_events=True)
        write_config(plan)  # says whose the folder is, before anything else is in it
    remove_cut_off_files(plan.run_folder)
    (plan.run_folder / STOP_NAME).unlink(missing_ok=True)  # of a try before this one


def holder_of(folder: Path) -> str | None:
    """Return what `powerflow train` prints of a folder that another process holds; None where it is free."""
    return held_by_another(folder, folder / LOCK_NAME)


def is_running(folder: Path) -> bool:
    """Whether a process that lives holds the folder, as far as its lock can be read."""
    try:
        return holder_of(folder) is not None
    except OSError:
        return False
