"""When do which servers get weights? All of them before a step's prompts are asked, and one that comes later by itself.

    give        all servers, the policy as it is; those that do not take it are left out
    bring_up    one server in a thread of the pool, of weights that are on a disk; where all ranks must take part it is
                noted, and `wants` tells the ranks that wait for answers
    give_more   what was noted, while no rank trains: the policy as it is, which may be newer than what others have

Left out: how weights travel (`by_folder.py`, `by_stream.py`), what is proved (`proof.py`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, broadcast_object, raise_together
from megatron_powerflow.serving.at_once import BEAT_SECONDS, on_all
from megatron_powerflow.serving.manifest import Manifest
from megatron_powerflow.serving.pool import Pool
from megatron_powerflow.serving.proof import Proof
from megatron_powerflow.serving.server import Server, ServerError, Unreachable
from megatron_powerflow.serving.transport import Given, Transport
from megatron_powerflow.serving.weight_sync import UNPROVED, Sync, bring, sleep


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What the last update of all servers came to, on the main rank. seconds: of it all; the gaps are of the worst."""

    seconds: float
    num_bytes: int
    whole_bytes: int
    gap_mean: float
    gap_max: float
    num_servers: int

    def metrics(self) -> dict[str, float]:
        """Return it by the names of metrics.jsonl."""
        return {
            "sync_seconds": self.seconds,
            "sync_bytes": float(self.num_bytes),
            "sync_share": self.num_bytes / self.whole_bytes,
            "sync_gap_mean": self.gap_mean,
            "sync_gap_max": self.gap_max,
            "num_servers": float(self.num_servers),
        }


class WeightGiver:
    """Gives the servers of a pool the policy's weights.

    pool: on the ranks that ask, the main rank among them; None elsewhere. prepare: makes a server ready to take
    weights. seconds: that it may take to load them. sleeps: servers are on the trainer's GPUs, and sleep at times.
    """

    def __init__(
        self,
        groups: Groups,
        pool: Pool | None,
        transport: Transport,
        *,
        prepare: Callable[[Server], None],
        seconds: float,
        sleeps: bool,
    ) -> None:
        self._groups, self._pool, self._transport = groups, pool, transport
        self._prepare, self._seconds, self._sleeps = prepare, seconds, sleeps
        self._versions: dict[str, Manifest] = {}  # that servers may have, the newest last
        self._waiting: dict[str, Server] = {}  # for the weights, until all ranks send them; on the main rank
        self._is_asleep = False
        self._late: deque[Proof] = deque()  # of servers that were given the weights by themselves, in their threads
        self.last_sync: SyncReport | None = None
        self.beat: Callable[[], None] = lambda: None

    @property
    def manifest(self) -> Manifest | None:
        """The newest version that was given; None before the first."""
        return next(reversed(self._versions.values()), None)

    def is_current(self, step: int) -> bool:
        """Whether all servers that take part have the policy after so many steps, and are awake."""
        return not self._is_asleep and [one.step for one in self._versions.values()] == [step]

    def give(self, step: int) -> None:
        """Give all servers the policy after `step` steps, unless they have it. Nothing must be asked meanwhile, but for
        what may be answered by two versions. Collective over the run."""
        if self.is_current(step):
            return
        began = time.monotonic()
        only_woken = [one.step for one in self._versions.values()] == [step]
        self._waiting.clear()
        given = self._give(step, lambda pool: pool.known())
        self._versions, self._is_asleep = {given.manifest.version: given.manifest}, False
        syncs = self._taken(given)
        urls = broadcast_object(sorted(syncs), self._groups)
        if self._pool is not None:
            self._pool.set_up(urls)
            self._pool.release()
        self._transport.tidy()
        if syncs and not only_woken:
            self.last_sync = SyncReport(
                time.monotonic() - began,
                given.manifest.num_bytes,
                given.manifest.whole_bytes,
                max(sync.proof.gap_mean for sync in syncs.values()),
                max(sync.proof.gap_max for sync in syncs.values()),
                len(syncs),
            )

    def wants(self) -> bool:
        """Whether a server waits for weights that all ranks must send."""
        return bool(self._waiting)

    def give_more(self, step: int) -> None:
        """Give the servers that wait for it the policy after `step` steps. Collective over the run."""
        given = self._give(step, lambda _: list(self._waiting.values()))
        self._waiting.clear()
        # Beside the others' version: their prompts may be under way by the one before, and go on by it.
        others = {version: one for version, one in self._versions.items() if version != given.manifest.version}
        self._versions = {**others, given.manifest.version: given.manifest}
        for url, sync in self._taken(given).items():
            assert self._pool is not None
            self._late.append(sync.proof)
            self._pool.take_in(url)  # the other ranks' pools look for themselves

    def _give(self, step: int, of: Callable[[Pool], list[Server]]) -> Given:
        """Give servers the policy; of: those, called once nobody else gives any of them weights. Collective."""
        newest = self.manifest
        last = newest if newest is not None and newest.step == step else None
        pool = self._pool
        if not self._groups.is_main or pool is None:
            return self._transport.give(step, last, [], self.beat)
        while not pool.bringing.acquire(timeout=BEAT_SECONDS):
            self.beat()
        try:
            return self._transport.give(step, last, of(pool), self.beat)
        finally:
            pool.bringing.release()

    def _taken(self, given: Given) -> dict[str, Sync]:
        """Leave out the servers that did not take the weights; return the others."""
        taken = {}
        for url, outcome in given.outcomes.items():
            if isinstance(outcome, ServerError):
                assert self._pool is not None
                self._pool.lose(url, str(outcome), for_good=not isinstance(outcome, Unreachable))
            else:
                taken[url] = outcome
        return taken

    def bring_up(self, server: Server) -> None:
        """Let a server take part that was lost or came later: what a pool asks for, in its own thread.

        The main rank gives it the weights and proves them; the others wait until it has. Raises Unreachable where it is
        to wait.
        """
        newest = self.manifest
        if newest is None:
            raise Unreachable("waits for the first weights")
        has = server.weight_version()
        if not self._groups.is_main:
            if has not in self._versions:
                raise Unreachable(f"has the weights {has!r}; {newest.version!r} are wanted")
            return
        manifest = self._versions.get(has.removesuffix(UNPROVED))
        if manifest is None and self._transport.needs_all:
            self._waiting[server.url] = server
            raise Unreachable(f"waits for the weights {newest.version!r}, or newer ones, which all ranks send together")
        self._prepare(server)
        self._late.append(bring(server, manifest or newest, seconds=self._seconds).proof)

    def rest(self) -> None:
        """Put the servers to sleep where they share the trainer's GPUs. Collective over the run."""
        failure = attempt(self._put_to_sleep, ServerError) if self._groups.is_main else None
        raise_together(
            failure, lambda text: f"a vLLM server on the trainer's GPUs does not sleep ({text})", self._groups
        )
        self._is_asleep = True

    @property
    def is_asleep(self) -> bool:
        """Whether the servers sleep, or share no GPU with the trainer and need not."""
        return self._is_asleep or not self._sleeps

    def _put_to_sleep(self) -> None:
        """Every server that answers; one that is gone holds nothing. For the main rank. Raises ServerError."""
        assert self._pool is not None
        for url, outcome in on_all(self._pool.known(), sleep, self.beat).items():
            if isinstance(outcome, Unreachable):
                self._pool.lose(url, str(outcome), for_good=False)
            elif isinstance(outcome, ServerError):
                raise outcome

    def metrics(self) -> dict[str, float]:
        """Return what the update of the servers before the last step came to, on the main rank; {} elsewhere.

        Gaps are also of servers that were given the weights by themselves since then.
        """
        report, self.last_sync = self.last_sync, None
        found = {} if report is None else report.metrics()
        while self._late:
            proof = self._late.popleft()
            found["sync_gap_mean"] = max(found.get("sync_gap_mean", 0.0), proof.gap_mean)
            found["sync_gap_max"] = max(found.get("sync_gap_max", 0.0), proof.gap_max)
        return found

    def close(self) -> None:
        """Remove what weights have left on a disk."""
        self._transport.close()
