"""Have all ranks come, and are they still there until they are connected?

Each rank leaves a word in the store, with its host and process. Whoever waits says for whom, and ends when one that had
come to this host is gone: what connects ranks would wait for it for half an hour, and each process group is connected
anew. Once all groups are there a lost rank breaks the collectives, and a run has its heartbeats (`watch.py`).

Left out: where the store is (`rendezvous.py`).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any, NoReturn

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.owner import Holder, has_ended, this_process

MEETING = timedelta(minutes=5)  # from the first process at the first rendezvous to the last one
NOTE_SECONDS = 30.0  # between two lines that say for whom it waits
LOOK_SECONDS = 1.0
GRACE_SECONDS = 3.0  # for a rank whose peer has left because it was refused: it will be refused too


@contextlib.contextmanager
def meeting(rank: int, world_size: int, store: Any) -> Iterator[None]:
    """Wait until every rank is there, then keep an eye on those of this host during the block.

    The block makes the process groups. store: torch's. Raises UserError with the ranks that do not come within MEETING.
    Ends this process, with exit code 1 and a line that says so, when a rank of this host is gone.
    """
    keys = [f"here/{other}" for other in range(world_size)]
    store.set(keys[rank], json.dumps(asdict(this_process("rank"))))
    ranks: dict[int, Holder] = {}
    over = threading.Event()
    threading.Thread(target=_look_after, args=(ranks, rank, over), name="meeting", daemon=True).start()
    try:
        _wait_for_all(ranks, rank, keys, store)
        yield
    except (RuntimeError, ValueError):  # of torch's store and of gloo: what a lost rank breaks, if one is lost
        time.sleep(LOOK_SECONDS)
        if gone := _gone(ranks, rank):
            _leave_without(gone, ranks, rank)
        raise
    finally:
        over.set()


def _wait_for_all(ranks: dict[int, Holder], rank: int, keys: list[str], store: Any) -> None:
    began = said = time.monotonic()
    while True:
        for other, key in enumerate(keys):
            if other not in ranks and store.check([key]):
                ranks[other] = Holder(**json.loads(store.get(key)))
        missing = [other for other in range(len(keys)) if other not in ranks]
        if not missing:
            return
        now = time.monotonic()
        who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:16]))}{', ...' * (len(missing) > 16)}"
        if now - began > MEETING.total_seconds():
            raise UserError(
                f"{who} of {len(keys)} did not come within {MEETING.total_seconds() / 60:.0f} minutes of "
                f"rank {rank} on {socket.gethostname()}; look at the logs of those that are missing, and "
                "that their nodes run"
            )
        if rank == 0 and now - said > NOTE_SECONDS:
            said = now
            print(f"waiting for {who} of {len(keys)}, {now - began:.0f} s", file=sys.stderr, flush=True)
        time.sleep(0.05 if now - began < 5 else 0.5)


def _look_after(ranks: dict[int, Holder], me: int, over: threading.Event) -> None:
    """In a thread of its own, which a wait in a library does not hold up."""
    while not over.wait(LOOK_SECONDS):
        if (gone := _gone(ranks, me)) and not over.wait(GRACE_SECONDS):
            _leave_without(gone, ranks, me)


def _gone(ranks: dict[int, Holder], me: int) -> list[int]:
    return sorted(rank for rank, holder in list(ranks.items()) if rank != me and has_ended(holder))


def _leave_without(gone: list[int], ranks: dict[int, Holder], me: int) -> NoReturn:
    """Of those that are left one says why."""
    if me == min(rank for rank in list(ranks) if rank not in gone):
        holder = ranks[gone[0]]
        who = f"rank {gone[0]} on {holder.host} (process {holder.pid})"
        os.write(2, f"{who} is gone, before the ranks were connected\n".encode())
    os._exit(1)
