"""How do vLLM servers sample for a run? Each sampler asks for its share of the prompts; the weights go out first.

    generate   the servers get the policy's weights if they changed, prompts are asked, answers are waited for
    begin      the same without the waiting: answers of a later step come while this one trains

One rank of each sampler speaks to the servers, in threads; the others hear from it. A response counts if the weights
that wrote it are this run's and not older than rollout.steps_ahead allows. While the main threads wait they meet every
now and then, so that a lost server, a full disk or a bug ends all of them alike.

Left out: HTTP (`server.py`), who answers (`pool.py`), files of weights (`weight_writer.py`), the proof (`proof.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megatron_powerflow.data.rollout_arrays import from_bytes, to_bytes
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.device_memory import give_back
from megatron_powerflow.parallel.exchange import exchange
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, broadcast_object, highest, raise_together
from megatron_powerflow.records import Prompt, Purpose, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import ProgressCallback
from megatron_powerflow.serving.answers import Answer
from megatron_powerflow.serving.ledger import Ledger
from megatron_powerflow.serving.manifest import Manifest, step_of
from megatron_powerflow.serving.pool import Ask, NoServer, Pool, UnwantedVersion
from megatron_powerflow.serving.server import Server, ServerError, Unreachable
from megatron_powerflow.serving.weight_sync import UNPROVED, Sync, bring, require_room, sleep, wake

POLL_SECONDS = 0.02  # between two meetings of the ranks while they wait, at first; up to SLOW_POLL_SECONDS
SLOW_POLL_SECONDS = 0.5
WORKING, DONE, FAILED = 0, 1, 2


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


@dataclass
class _Work:
    """The prompts of one step and purpose, on the rank that asks."""

    total: int
    groups: dict[int, tuple[Rollout, ...]]


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """run_id: of the versions. lag: how many steps older than asked for the weights of a response may be. mixed:
    whether weights may change within a response. sync_seconds: that a server may take to load weights. longest: tokens
    of a prompt and its response. sleeps: servers are on the trainer's GPUs."""

    run_id: str
    lag: int
    mixed: bool
    sync_seconds: float
    longest: int
    sleeps: bool = False


class VllmEngine:
    """An engine whose responses are drawn by vLLM servers.

    pool: on the ranks that ask (`asks`); None elsewhere. publish: writes the weights after so many steps for the
    servers. forget: removes older ones. Both are collective. clean: removes all, at the end. ledger: as pool.
    """

    def __init__(
        self,
        groups: Groups,
        pool: Pool | None,
        ledger: Ledger | None,
        settings: VllmSettings,
        *,
        publish: Callable[[int], Manifest],
        forget: Callable[[], None],
        clean: Callable[[], None] = lambda: None,
        first_step: int,
    ) -> None:
        self._groups, self._pool, self._ledger, self._settings = groups, pool, ledger, settings
        self._publish, self._forget, self._clean = publish, forget, clean
        self._step = first_step
        self.manifest: Manifest | None = None
        self._work: dict[tuple[int, int], _Work] = {}
        self._lock = threading.Lock()
        self._is_asleep = False
        self.last_sync: SyncReport | None = None
        self.beat: Callable[[], None] = lambda: None
        self._stop_asked: Callable[[], bool] = lambda: False

    def show_life(self, beat: Callable[[], None], stop_asked: Callable[[], bool]) -> None:
        """Call `beat` while it waits for servers, which no pass through the model shows; wait for none any more once
        the run was asked to stop."""
        self.beat, self._stop_asked = beat, stop_asked

    def new_weights(self, step: int) -> None:
        """Note that the policy is now that after `step` steps."""
        self._step = step

    def generate(
        self, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams, progress: ProgressCallback | None = None
    ) -> list[Rollout]:
        """Draw responses, as `Engine.generate` says; what `begin` asked for is waited for. Collective over the run."""
        self.begin(prompts, sampling)
        key = (sampling.purpose, sampling.step)
        self._wait_for(key, progress)
        mine: list[Rollout] = []
        if self._pool is not None:
            work = self._work[key]
            mine = [rollout for slot, _ in prompts for rollout in work.groups[slot]]
        self._work.pop(key, None)
        return self._to_replica(mine)

    def begin(self, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams) -> None:
        """Ask for responses without waiting for them, unless that was done. Collective over the run."""
        key = (sampling.purpose, sampling.step)
        if key in self._work:
            if self._settings.mixed:  # what is under way goes on with the new weights
                self._give_weights()
            return
        self._give_weights()
        work = self._work[key] = _Work(len(prompts), {})
        failure = None
        if self._pool is not None:
            failure = attempt(lambda: self._ask(work, prompts, sampling), OSError)
        raise_together(failure, str, self._groups)

    def _ask(self, work: _Work, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams) -> None:
        assert self._pool is not None
        ledger = self._ledger if sampling.purpose == Purpose.ROLLOUTS else None  # what is trained on
        if ledger is not None:
            work.groups.update(ledger.found(prompts, sampling))
        asks = [
            Ask(slot, prompt, sampling, lambda answer, url: self._took(work, answer, url, sampling))
            for slot, prompt in prompts
            if slot not in work.groups
        ]
        self._pool.ask(asks, first=ledger is None)

    def _took(self, work: _Work, answer: Answer, url: str, sampling: SamplingParams) -> None:
        """In a thread of a server: keep a group, on the disk first."""
        rollouts = [
            replace(rollout, weight_versions=self._versions(spans, url, sampling))
            for rollout, spans in zip(answer.rollouts, answer.spans, strict=True)
        ]
        with self._lock:
            if answer.slot in work.groups:
                return
            if self._ledger is not None and sampling.purpose == Purpose.ROLLOUTS:
                self._ledger.take(answer, rollouts, sampling, url)
            work.groups[answer.slot] = tuple(rollouts)

    def _versions(self, spans, url: str, sampling: SamplingParams) -> tuple[tuple[int, int, int], ...]:
        """The steps of the weights that wrote a response, by span. Raises UnwantedVersion."""
        end = UNPROVED if self._settings.mixed else ""  # what was under way goes on while the weights are proved
        found = [
            (step_of(span.version.removesuffix(end), self._settings.run_id), span.start, span.end) for span in spans
        ]
        foreign = [span.version for span, (step, _, _) in zip(spans, found, strict=True) if step is None]
        if foreign:
            raise UnwantedVersion(f"{url}: a response by the weights {foreign[0]!r}, which are not this run's: dropped")
        steps = [step for step, _, _ in found if step is not None]
        if len(set(steps)) > 1 and not self._settings.mixed:
            raise UnwantedVersion(f"{url}: a response by the weights of steps {sorted(set(steps))}, mixed: dropped")
        if sampling.purpose == Purpose.ROLLOUTS and min(steps) < sampling.step - self._settings.lag:
            raise UnwantedVersion(
                f"{url}: a response for step {sampling.step} by the weights of step {min(steps)}; at most "
                f"{self._settings.lag} older is wanted: dropped"
            )
        if sampling.purpose != Purpose.ROLLOUTS and (self.manifest is None or set(steps) != {self.manifest.step}):
            raise UnwantedVersion(f"{url}: an answer by the weights of steps {sorted(set(steps))}, not the policy's")
        if sampling.purpose != Purpose.ROLLOUTS or set(steps) == {sampling.step}:
            return ()  # of its step, which goes without saying
        return tuple((step, start, end) for (step, start, end) in found if step is not None)

    def _give_weights(self) -> None:
        """Give the servers the policy's weights, unless they have them. Collective over the run."""
        current = self.manifest is not None and self.manifest.step == self._step
        if current and not self._is_asleep:
            return
        began = time.monotonic()
        self._hold()
        if not current:
            self.manifest = self._publish(self._step)
        if self._settings.sleeps:
            give_back(self._groups.device)
        manifest, self._is_asleep = self.manifest, False
        assert manifest is not None
        synced: dict[str, Sync] = {}
        failure = None
        if self._groups.is_main:
            failure = attempt(lambda: synced.update(self._bring_all()), UserError, ServerError)
        raise_together(failure, str, self._groups)
        urls = broadcast_object(sorted(synced), self._groups)
        if self._pool is not None:
            self._pool.set_up(urls)
            self._pool.release()
        self._forget()
        if synced and not current:
            self.last_sync = SyncReport(
                time.monotonic() - began,
                manifest.num_bytes,
                manifest.whole_bytes,
                max(sync.proof.gap_mean for sync in synced.values()),
                max(sync.proof.gap_max for sync in synced.values()),
                len(synced),
            )

    def _hold(self) -> None:
        """Ask nothing more, and without in-flight updates wait for what is being answered. Collective."""
        if self._pool is not None:
            self._pool.hold()
        if self._settings.mixed:
            return
        self._meet(lambda: self._pool is None or self._pool.num_open == 0, None)

    def _bring_all(self) -> dict[str, Sync]:
        """Give every server that answers the newest weights, at the same time. For the main rank.

        A server that does not take them is left out; one that takes them and computes something else ends the run.
        """
        assert self._pool is not None and self.manifest is not None
        manifest, pool = self.manifest, self._pool
        while not pool.bringing.acquire(timeout=SLOW_POLL_SECONDS):  # a server that came back is given the last ones
            self.beat()
        try:
            tries = self._on_all(pool.known(), lambda server: self._bring(server, manifest))
        finally:
            pool.bringing.release()
        synced = {}
        for url, future in tries.items():
            error = future.exception()
            if error is None:
                synced[url] = future.result()
            elif isinstance(error, ServerError):
                pool.lose(url, str(error), for_good=not isinstance(error, Unreachable))
            else:
                raise error
        return synced

    def _on_all(self, servers: Sequence[Server], call: Callable[[Server], Any]) -> dict[str, Future]:
        """Call something for every server at the same time; return address -> what came of it, all done."""
        with ThreadPoolExecutor(max(len(servers), 1)) as executor:
            tries = {server.url: executor.submit(call, server) for server in servers}
            while wait(tries.values(), timeout=SLOW_POLL_SECONDS).not_done:
                self.beat()
        return tries

    def _bring(self, server: Server, manifest: Manifest) -> Sync:
        require_room(server, self._settings.longest)
        if self._settings.sleeps:
            wake(server)
        return bring(server, manifest, seconds=self._settings.sync_seconds)

    def bring_up(self, server: Server) -> None:
        """Let a server take part that was lost or came later: what a pool asks for, in its own thread.

        The main rank gives it the weights and proves them; the others wait until it has.
        """
        manifest = self.manifest
        if manifest is None:
            raise Unreachable("waits for the first weights")
        if self._groups.is_main:
            self._bring(server, manifest)
        elif (version := server.weight_version()) != manifest.version:
            raise Unreachable(f"has the weights {version!r}; {manifest.version!r} are wanted")

    def _wait_for(self, key: tuple[int, int], progress: ProgressCallback | None) -> None:
        size = None

        def is_done() -> bool:
            nonlocal size
            if self._pool is None:
                return True
            work = self._work[key]
            if progress is not None:
                size = size or max((len(group) for group in list(work.groups.values())), default=None)
                progress(len(work.groups) * (size or 1), work.total * (size or 1))
            return len(work.groups) == work.total

        self._meet(is_done, self._pool)

    def _meet(self, is_done: Callable[[], bool], needs: Pool | None) -> None:
        """Wait until every rank is done, and fail alike where one fails. Collective over the run.

        needs: the pool that must have a server; None where nothing is asked.
        """
        pause = POLL_SECONDS
        while True:
            self.beat()
            failure = None
            state = WORKING
            try:
                if self._pool is not None:
                    self._pool.require_sound()
                state = DONE if is_done() else WORKING
                if needs is not None and state == WORKING:
                    needs.require_some(at_once=self._stop_asked())
            except (NoServer, UserError, OSError) as error:
                failure, state = error, FAILED
            lowest = -highest(-state, self._groups)
            if highest(state, self._groups) == FAILED:
                self._fail(failure)
            if lowest == DONE:
                return
            time.sleep(pause)
            pause = min(pause * 1.5, SLOW_POLL_SECONDS)

    def _fail(self, failure: BaseException | None) -> None:
        """Raise what one of the ranks met, on all of them: NoServer where that is all that is wrong."""
        everyone: list[str | None] = [None] * self._groups.world_size
        mine = str(failure) if isinstance(failure, NoServer) else None
        dist.all_gather_object(everyone, mine, group=self._groups.control)
        raise_together(None if isinstance(failure, NoServer) else failure, str, self._groups)
        raise NoServer(next(text for text in everyone if text is not None))

    def _to_replica(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Give the rollouts, which the rank that asks has, to every rank of its tensor and pipeline groups."""
        groups, parts = self._groups, {}
        if groups.tp_size * groups.pp_size == 1:
            return rollouts
        if self._pool is not None:
            data = to_bytes(rollouts)
            parts = {rank: data for rank in ranks_of_sampler(groups) if rank != groups.rank}
        received = exchange(parts, groups)
        return rollouts if self._pool is not None else [rollout for part in received for rollout in from_bytes(part)]

    def rest(self) -> None:
        """Put the servers to sleep where they share the trainer's GPUs. Collective over the run."""
        if not self._settings.sleeps or self._is_asleep:
            return
        self._hold()
        failure = attempt(self._put_to_sleep, ServerError) if self._groups.is_main else None
        raise_together(
            failure, lambda text: f"a vLLM server on the trainer's GPUs does not sleep ({text})", self._groups
        )
        self._is_asleep = True

    def _put_to_sleep(self) -> None:
        """Every server that answers; one that is gone holds nothing. For the main rank. Raises ServerError."""
        assert self._pool is not None
        for url, future in self._on_all(self._pool.known(), sleep).items():
            error = future.exception()
            if isinstance(error, Unreachable):
                self._pool.lose(url, str(error), for_good=False)
            elif error is not None:
                raise error

    def metrics(self) -> dict[str, float]:
        """Return what the update of the servers before the last step came to, on the main rank; {} elsewhere."""
        report, self.last_sync = self.last_sync, None
        return {} if report is None else report.metrics()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.close()
        self._clean()


def asks(groups: Groups) -> bool:
    """Whether this rank speaks to the servers for its sampler: the first stage's tensor-parallel rank 0."""
    return groups.tp_rank == 0 and groups.is_first_stage


def ranks_of_sampler(groups: Groups) -> list[int]:
    """Return the ranks of this rank's tensor and pipeline groups. rank = tp + tp_size * (cp + cp_size * (dp + ...))."""
    stages = [dist.get_global_rank(groups.pp, stage) for stage in range(groups.pp_size)]
    return [stage - groups.tp_rank + place for stage in stages for place in range(groups.tp_size)]
