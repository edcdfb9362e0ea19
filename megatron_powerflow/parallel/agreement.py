"""How do processes agree before there are process groups? The main process asks, and tells the others the answer.

This is for what one process should ask of a network and all must know, such as the commit that a name on the hub stands
for. They meet in a key-value store, which is torchrun's, or the main process's own under srun.

Left out: the store (`rendezvous.py`) and process groups (`initialize.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.rendezvous import rendezvous

LONGEST_WAIT = timedelta(hours=12)  # of the others, while the main process downloads a model
T = TypeVar("T")


def main_first(launch: Launch, name: str, find: Callable[[], str], take_up: Callable[[str], T]) -> T:
    """Return `take_up(text)` on every process, where the text is what `find` returned on the main process.

    A UserError of any process is raised on all of them. name: the agreement's, which a process makes once. Collective
    over all processes of the launch.
    """
    if launch.world_size == 1:
        return take_up(find())
    store = rendezvous(launch, LONGEST_WAIT)
    found, taken, verdict, heard = (f"{name}/{key}" for key in ("found", "taken", "verdict", "heard"))
    if launch.is_main:
        try:
            text, violations = _tried(find)
        except BaseException:
            store.set(found, json.dumps([None, ["the main process failed; its own message says at what"]]))
            raise
        store.set(found, json.dumps([text, violations]))
    text, violations = json.loads(store.get(found))
    taken_up: list[T] = []
    if not violations:
        _, violations = _tried(lambda: taken_up.append(take_up(text)))
    store.set(f"{taken}/{launch.rank}", json.dumps(violations))
    if launch.is_main:
        everything = [text for rank in range(launch.world_size) for text in json.loads(store.get(f"{taken}/{rank}"))]
        store.set(verdict, json.dumps(list(dict.fromkeys(everything))))
    violations = json.loads(store.get(verdict))
    if store.add(heard, 1) == launch.world_size:
        store.set(f"{heard}/by_all", "")
    if launch.is_main:
        store.wait([f"{heard}/by_all"])  # the main process may be about to end, and the store with it
    if violations:
        raise UserError(violations)
    return taken_up[0]


def _tried(function: Callable[[], T]) -> tuple[T | None, Sequence[str]]:
    """Return the function's value, or what its UserError says."""
    try:
        return function(), ()
    except UserError as error:
        return None, error.violations
