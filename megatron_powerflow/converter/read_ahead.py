"""How is the next tensor read while this one is being written? One thread, one tensor ahead; no more in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


class ReadAhead(Generic[Item, Made]):
    """Calls make(item) for items that are mostly asked for in `order`, each begun when the one before it is handed out.

    Another order gives the same results more slowly. make runs in one thread only; what it raises is raised to the
    caller who asks for the item.
    """

    def __init__(self, make: Callable[[Item], Made], order: Sequence[Item]) -> None:
        self._make = make
        self._following = dict(itertools.pairwise(order))
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._begun: tuple[Item, Future[Made]] | None = None

    def __call__(self, item: Item) -> Made:
        begun, self._begun = self._begun, None
        future = begun[1] if begun is not None and begun[0] == item else self._pool.submit(self._make, item)
        made = future.result()
        if item in self._following:
            following = self._following[item]
            self._begun = following, self._pool.submit(self._make, following)
        return made

    def close(self) -> None:
        """Stop the thread, once it has made what it is making."""
        self._pool.shutdown(cancel_futures=True)
