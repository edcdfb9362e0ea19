"""How do the ranks wait together? They meet every now and then, so that what ends one of them ends all alike.

At a meeting each says whether it is done, has failed, or wants something of all; what one of them says holds for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import raise_together
from megatron_powerflow.serving.pool import NoServer

POLL_SECONDS = 0.02  # between two meetings, at first; up to SLOW_POLL_SECONDS
SLOW_POLL_SECONDS = 0.5


def meet(
    groups: Groups,
    is_done: Callable[[], bool],
    *,
    beat: Callable[[], None],
    is_wanted: Callable[[], bool] = lambda: False,
    do: Callable[[], None] = lambda: None,
) -> None:
    """Wait until every rank is done, and fail alike where one fails. Collective over the run.

    is_done: raises NoServer, UserError or OSError where the wait is in vain. is_wanted: whether all ranks must `do`
    something meanwhile, which is collective. beat: shows that this rank lives.
    """
    pause = POLL_SECONDS
    while True:
        beat()
        failure: BaseException | None = None
        done = False
        try:
            done = is_done()
        except (NoServer, UserError, OSError) as error:
            failure = error
        anyone = torch.tensor([failure is not None, not done, is_wanted()], dtype=torch.int64)
        dist.all_reduce(anyone, op=dist.ReduceOp.MAX, group=groups.control)
        has_failed, works, wants = anyone.tolist()
        if has_failed:
            _fail(failure, groups)
        if not works:
            return
        if wants:
            do()
            pause = POLL_SECONDS
        time.sleep(pause)
        pause = min(pause * 1.5, SLOW_POLL_SECONDS)


def _fail(failure: BaseException | None, groups: Groups) -> None:
    """Raise what one of the ranks met, on all of them: NoServer where that is all that is wrong."""
    everyone: list[str | None] = [None] * groups.world_size
    mine = str(failure) if isinstance(failure, NoServer) else None
    dist.all_gather_object(everyone, mine, group=groups.control)
    raise_together(None if isinstance(failure, NoServer) else failure, str, groups)
    raise NoServer(next(text for text in everyone if text is not None))
