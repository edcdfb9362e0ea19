"""How do ranks decide, and fail, as one? Small values over host memory, so that all of them go on or stop at one line.

Ranks that share experts decode different prompts in step: a layer's tokens travel to the ranks that hold their experts,
so a forward pass is collective over the expert-parallel group, while every rank of it has prompts of its own. Before
each pass they ask each other whether anyone has tokens left (`anyone`); whoever has none makes an idle pass, over
padding that is stored nowhere. That costs one message a pass, and nothing where ep is 1.

Left out: tensors (`collectives.py`), agreement before there are process groups (`agreement.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_powerflow.errors import UserError, disk_refusal
from megatron_powerflow.parallel.groups import Groups

Value = TypeVar("Value")


def any_rank(flag: bool, groups: Groups) -> bool:
    """True everywhere when `flag` is True on at least one rank."""
    return bool(highest(int(flag), groups))


def highest(number: int, groups: Groups) -> int:
    """The largest of all ranks' numbers, everywhere."""
    value = torch.tensor([number])
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=groups.control)
    return int(value.item())


def attempt(function: Callable[[], object], *kinds: type[BaseException]) -> BaseException | None:
    """What the function failed with, where it is of these kinds, so that all ranks can stop together."""
    try:
        function()
    except kinds as error:
        return error
    return None


def raise_together(failure: BaseException | None, say: Callable[[str], str], groups: Groups) -> None:
    """A UserError on every rank where any of them has a failure: that of the lowest such rank. Collective.

    Lets every rank leave a collective section when one of them met a full disk. say: the sentence for what went wrong;
    a UserError says itself what is wrong.
    """
    mine: tuple[str, ...] = ()
    if isinstance(failure, UserError):
        mine = failure.violations
    elif failure is not None:
        mine = (say(f"{type(failure).__name__}: {failure}"),)
    everyone: list[tuple[str, ...]] = [()] * groups.world_size
    dist.all_gather_object(everyone, mine, group=groups.control)
    if violations := next((texts for texts in everyone if texts), None):
        raise UserError(violations)


def on_main(function: Callable[[], Value], groups: Groups) -> Value:
    """What the function gives on the main rank, on every rank; what it finds wrong, or the disk refuses, is a UserError
    everywhere. Collective.

    For what is decided in one place, such as who owns a folder. The value is pickled among the processes of this run.
    """
    value, failure = None, None
    if groups.is_main:
        try:
            value = function()
        except UserError as error:
            failure = error
        except OSError as error:
            failure = disk_refusal(error)
    raise_together(failure, str, groups)
    return broadcast_object(value, groups)


def broadcast_object(value, groups: Groups):
    """Rank 0's value on every rank (host memory, pickled among the processes of this run only)."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=groups.control)
    return box[0]


def gather_to_main(value: Value, groups: Groups) -> list[Value] | None:
    """Every rank's value, by rank, on rank 0; None elsewhere."""
    everything: list[Any] | None = [None] * groups.world_size if groups.is_main else None
    dist.gather_object(value, everything, dst=0, group=groups.control)
    return everything


def largest(number: int, groups: Groups) -> int:
    """The largest of the numbers that the ranks of this expert-parallel group give."""
    if groups.ep_size == 1:
        return number
    value = torch.tensor([number])
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=groups.ep_control)
    return int(value.item())


def anyone(has_tokens: bool, groups: Groups) -> bool:
    """Whether another pass is to be made: on every rank of the group alike."""
    return bool(largest(int(has_tokens), groups))
