"""Do all ranks come, and do they stay until the pre-flight is over? Each writes a beat into torch's store every second.

The main rank reads the beats and judges (`judging.py`); the others wait for its verdict. Both happen in threads, since
a main thread may be in a collective that never returns. Whoever hears nothing of the store has lost the main rank, and
says so by itself. Left out: where the store is (`parallel/rendezvous.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from megatron_powerflow.errors import EXIT_REQUEUE
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.preflight.judging import Heard, judge, not_come, note
from megatron_powerflow.preflight.reports import Card, Report, Verdict, card_of_json, report_of_json

BEAT_SECONDS = 1.0
LOST_SECONDS = 20.0  # without an answer of the store
STAY_SECONDS = 5.0  # for which the main rank, which may hold the store, waits for the others to hear its verdict


class RollCall:
    """The roll call of one rank. A context, whose threads end with the process.

    open_store: makes a client of the store, of its own for each thread. nodes: of ranks, as far as the launcher knows.
    ended: called in another thread with the verdict, where this rank's main thread does not come to it; says: whether
    this rank prints it.
    """

    def __init__(
        self,
        launch: Launch,
        open_store: Callable[[], Any],
        nodes: Mapping[int, str],
        limit_seconds: float,
        ended: Callable[..., object],
    ) -> None:
        self._launch, self._nodes, self._limit, self._ended = launch, dict(nodes), limit_seconds, ended
        self._open, self._store = open_store, open_store()
        self._stage, self._what, self._broken = 0, "the roll call", ""
        self._is_met = self._is_over = False
        self._began = self._answered = time.monotonic()

    def __enter__(self) -> RollCall:
        for function in (self._beat, self._look_after_store):
            threading.Thread(target=function, name=function.__name__.strip("_"), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._is_over = True

    def enter(self, what: str) -> None:
        """Note what this rank begins now, for the others."""
        self._stage, self._what = self._stage + 1, what

    def break_off(self, text: str) -> None:
        """Wait for the verdict, which ends this process, after this rank has failed with `text`."""
        self._broken = text
        time.sleep(10 * self._limit)

    def meet(self, card: Card) -> list[Card]:
        """Return the cards of all ranks, by rank. Collective; who does not come is judged in a thread."""
        rank, world_size = self._launch.rank, self._launch.world_size
        self._store.set(f"here/{rank}", json.dumps(asdict(card)))
        if self._launch.is_main:
            cards = [card_of_json(text) for text in self._of_all("here")]
            self._store.set("cards", json.dumps([asdict(item) for item in cards]))
        else:
            self._wait_for("cards")
            cards = [Card(**values) for values in json.loads(self._store.get("cards"))]
        self._nodes = {other: cards[other].node for other in range(world_size)}
        self.enter("the roll call")
        self._is_met = True
        return cards

    def gather(self, report: Report) -> list[Report] | None:
        """Return every rank's report, by rank, on the main one; None elsewhere. Collective."""
        self.enter("handing in what it has measured")
        self._store.set(f"report/{report.rank}", json.dumps(asdict(report)))
        return [report_of_json(text) for text in self._of_all("report")] if self._launch.is_main else None

    def conclude(self, verdict: Verdict) -> None:
        """Tell the others the verdict, and stay until they have heard it. For the main rank."""
        self._is_over = True
        self._publish(self._store, verdict)

    def await_verdict(self) -> Verdict:
        """Return the main rank's verdict. For the others."""
        self._wait_for("verdict")
        self._is_over = True
        self._store.add("heard", 1)
        return Verdict.of_json(self._store.get("verdict"))

    def _publish(self, store: Any, verdict: Verdict) -> None:
        store.set("verdict", verdict.to_json())
        until = time.monotonic() + STAY_SECONDS
        while time.monotonic() < until and store.add("heard", 0) < self._launch.world_size - 1:
            time.sleep(0.05)

    def _of_all(self, kind: str) -> list[bytes]:
        keys = [f"{kind}/{rank}" for rank in range(self._launch.world_size)]
        for key in keys:
            self._wait_for(key)
        return [self._store.get(key) for key in keys]

    def _wait_for(self, key: str) -> None:
        """For ever: the threads end this process where it takes too long."""
        while not self._store.check([key]):
            time.sleep(0.2)

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # of torch's store, which is gone: `_look_after_store` says so
            store, heard = self._open(), dict[int, Heard]()
            for count in itertools.count():
                if self._is_over:
                    break
                beat = {"count": count, "stage": self._stage, "what": self._what, "broken": self._broken}
                store.set(f"beat/{self._launch.rank}", json.dumps(beat))
                self._end_if_judged(store, heard)
                self._answered = time.monotonic()
                time.sleep(BEAT_SECONDS)

    def _end_if_judged(self, store: Any, heard: dict[int, Heard]) -> None:
        if self._launch.is_main:
            verdict = self._judge(store, heard)
            if verdict is not None and not self._is_over:
                self._is_over = True
                self._publish(store, verdict)
                self._ended(verdict, says=True)
        elif store.check(["verdict"]):
            time.sleep(BEAT_SECONDS)  # for the main thread, which may have seen it too
            if not self._is_over:
                self._is_over = True
                store.add("heard", 1)
                self._ended(Verdict.of_json(store.get("verdict")), says=False)

    def _judge(self, store: Any, heard: dict[int, Heard]) -> Verdict | None:
        now, ranks = time.monotonic(), range(self._launch.world_size)
        if not self._is_met:
            if now - self._began <= self._limit:
                return None
            missing = [rank for rank in ranks if not store.check([f"here/{rank}"])]
            return not_come(missing, self._nodes, len(ranks), now - self._began) if missing else None
        for rank in ranks:
            if store.check([key := f"beat/{rank}"]):
                note(heard, rank, json.loads(store.get(key)), now)
        return judge(heard, [self._nodes[rank] for rank in ranks], now, self._limit)

    def _look_after_store(self) -> None:
        """In a thread of its own: asking a store that does not answer never ends."""
        while not self._is_over:
            time.sleep(BEAT_SECONDS)
            if time.monotonic() - self._answered > LOST_SECONDS and not self._is_over:
                self._is_over = True
                said = f"no word from its store for {LOST_SECONDS:.0f} s"
                self._ended(lost_main_rank(self._launch, self._nodes, said), says=self._launch.local_rank == 0)


def lost_main_rank(launch: Launch, nodes: Mapping[int, str], said: str) -> Verdict:
    """Return the verdict of a rank that does not reach the store. said: why, for people."""
    where = f" on {nodes[0]}" if 0 in nodes else ""
    line = f"rank {launch.rank} does not reach rank 0{where} ({said}): rank 0 is stopped or killed, or its node is away"
    return Verdict(EXIT_REQUEUE, (line,), (nodes[0],) if 0 in nodes else ())


def open_store(host: str, port: int, prefix: str, seconds: float) -> Any:
    """Return a client of torch's store at this place. seconds: that connecting may take. Raises RuntimeError."""
    import torch.distributed as dist

    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))
    return dist.PrefixStore(prefix, store)
