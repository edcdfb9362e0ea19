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
    """This process, `rank`, among `size` of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes the small files."""
        return self.rank == 0

    def share(self, items: Sequence[Item], num_bytes: Callable[[Item], int]) -> list[Item]:
        """Return this rank's items, in their order. The largest are dealt first, each to the least loaded rank."""
        load, my_indices = [0] * self.size, set()
        for index in sorted(range(len(items)), key=lambda index: -num_bytes(items[index])):
            rank = load.index(min(load))
            load[rank] += num_bytes(items[index])
            if rank == self.rank:
                my_indices.add(index)
        return [item for index, item in enumerate(items) if index in my_indices]

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank, on every rank. Collective."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, function: Callable[[], Item]) -> Item:
        """Run the function on every rank and return this rank's result. Collective.

        Raises UserError on all ranks with the violations of every rank.
        """
        made: list[Item] = []
        violations: tuple[str, ...] = ()
        try:
            made.append(function())
        except UserError as error:
            violations = error.violations
        except OSError as error:
            violations = (f"could not be read or written: {error}",)
        if all_violations := tuple(dict.fromkeys(text for texts in self.gather(violations) for text in texts)):
            raise UserError(all_violations)
        return made[0]
