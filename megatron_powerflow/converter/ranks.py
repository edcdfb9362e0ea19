"""How do processes share the conversion of a model? Each takes its part of the tensors; all fail together.

Only torch's default process group is used, and none for a process alone: no model, no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_powerflow.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among `size`."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[Item], num_bytes: Callable[[Item], int]) -> list[Item]:
        """This rank's items, in their order: the largest go first to whoever has least."""
        load, mine = [0] * self.size, set()
        for place in sorted(range(len(items)), key=lambda place: -num_bytes(items[place])):
            rank = load.index(min(load))
            load[rank] += num_bytes(items[place])
            if rank == self.rank:
                mine.add(place)
        return [item for place, item in enumerate(items) if place in mine]

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank. Collective."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], Item]) -> Item:
        """The function on every rank; what any of them found wrong is raised on all. Collective."""
        made: list[Item] = []
        violations: tuple[str, ...] = ()
        try:
            made.append(function())
        except UserError as error:
            violations = error.violations
        except OSError as error:
            violations = (f"could not be read or written: {error}",)
        if found := tuple(dict.fromkeys(text for texts in self.gather(violations) for text in texts)):
            raise UserError(found)
        return made[0]
