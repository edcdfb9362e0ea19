"""How do ranks that share their experts decode different prompts? In step: as many forward passes on each of them.

A layer's tokens travel to the ranks that hold their experts, so a forward pass is collective over the expert-parallel
group, while every rank of it has prompts of its own, which end when they end. Before each pass the ranks ask each other
whether anyone has tokens left; whoever has none makes an idle pass, over padding that is stored nowhere.

Costs: one message over host memory a pass, and the idle passes. Nothing where ep is 1.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_powerflow.parallel.groups import Groups


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
