"""How do vLLM servers sample for a run? Each sampler asks for its share of the prompts; the weights go out first.

    generate   the servers get the policy's weights if they changed, prompts are asked, answers are waited for
    begin      the same without the waiting: answers of a later step come while this one trains

One rank of each sampler speaks to the servers, in threads; the others hear from it. A response counts if the weights
that wrote it are this run's and not older than rollout.steps_ahead allows. While the main threads wait they meet every
now and then, so that a lost server, a full disk or a bug ends all of them alike.

Left out: HTTP (`server.py`), who answers (`pool.py`), who gets which weights (`weight_giving.py`), the meetings
(`meeting.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from megatron_powerflow.data.rollout_arrays import from_bytes, to_bytes
from megatron_powerflow.parallel.exchange import exchange
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, raise_together
from megatron_powerflow.records import Prompt, Purpose, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import ProgressCallback
from megatron_powerflow.serving.answers import Answer
from megatron_powerflow.serving.ledger import Ledger
from megatron_powerflow.serving.manifest import step_of
from megatron_powerflow.serving.meeting import meet
from megatron_powerflow.serving.pool import Ask, Pool, UnwantedVersion
from megatron_powerflow.serving.weight_giving import WeightGiver
from megatron_powerflow.serving.weight_sync import UNPROVED


@dataclass
class _Work:
    """The prompts of one step and purpose, on the rank that asks."""

    total: int
    groups: dict[int, tuple[Rollout, ...]]


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """run_id: of the versions. lag: how many steps older than asked for the weights of a response may be. mixed:
    whether weights may change within a response."""

    run_id: str
    lag: int
    mixed: bool


class VllmEngine:
    """An engine whose responses are drawn by vLLM servers.

    pool: on the ranks that ask (`asks`); None elsewhere. ledger: as pool. giver: of the weights. forget: called, on all
    ranks, after servers were given new ones.
    """

    def __init__(
        self,
        groups: Groups,
        pool: Pool | None,
        ledger: Ledger | None,
        giver: WeightGiver,
        settings: VllmSettings,
        *,
        forget: Callable[[], None] = lambda: None,
        first_step: int,
    ) -> None:
        self._groups, self._pool, self._ledger, self._giver = groups, pool, ledger, giver
        self._settings, self._forget = settings, forget
        self._step = first_step
        self._work: dict[tuple[int, int], _Work] = {}
        self._lock = threading.Lock()
        self._stop_asked: Callable[[], bool] = lambda: False

    def show_life(self, beat: Callable[[], None], stop_asked: Callable[[], bool]) -> None:
        """Call `beat` while it waits for servers, which no pass through the model shows; wait for none any more once
        the run was asked to stop."""
        self._giver.beat, self._stop_asked = beat, stop_asked

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
        newest = self._giver.manifest
        if sampling.purpose != Purpose.ROLLOUTS and (newest is None or set(steps) != {newest.step}):
            raise UnwantedVersion(f"{url}: an answer by the weights of steps {sorted(set(steps))}, not the policy's")
        if sampling.purpose != Purpose.ROLLOUTS or set(steps) == {sampling.step}:
            return ()  # of its step, which goes without saying
        return tuple((step, start, end) for (step, start, end) in found if step is not None)

    def _give_weights(self) -> None:
        """Give the servers the policy's weights, unless they have them. Collective over the run."""
        if not self._giver.is_current(self._step):
            self._hold()
            self._giver.give(self._step)
            self._forget()

    def _hold(self) -> None:
        """Ask nothing more, and without in-flight updates wait for what is being answered. Collective."""
        if self._pool is not None:
            self._pool.hold()
        if not self._settings.mixed:
            self._meet(lambda: self._pool is None or self._pool.num_open == 0)

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

        self._meet(is_done, needs=self._pool, give_more=True)

    def _meet(self, is_done: Callable[[], bool], *, needs: Pool | None = None, give_more: bool = False) -> None:
        """Wait until every rank is done, and fail alike where one fails. Collective over the run.

        needs: the pool that must have a server; None where nothing is asked. give_more: servers that come back
        meanwhile are given the policy where all ranks must take part in that.
        """

        def look() -> bool:
            if self._pool is not None:
                self._pool.require_sound()
            done = is_done()
            if needs is not None and not done:
                needs.require_some(at_once=self._stop_asked())
            return done

        meet(
            self._groups,
            look,
            beat=self._giver.beat,
            is_wanted=lambda: give_more and self._giver.wants(),
            do=lambda: self._giver.give_more(self._step),
        )

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
        if not self._giver.is_asleep:
            self._hold()
            self._giver.rest()

    def metrics(self) -> dict[str, float]:
        """Return what the update of the servers before the last step came to, on the main rank; {} elsewhere."""
        return self._giver.metrics()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.close()
        self._giver.close()


def asks(groups: Groups) -> bool:
    """Whether this rank speaks to the servers for its sampler: the first stage's tensor-parallel rank 0."""
    return groups.tp_rank == 0 and groups.is_first_stage


def ranks_of_sampler(groups: Groups) -> list[int]:
    """Return the ranks of this rank's tensor and pipeline groups. rank = tp + tp_size * (cp + cp_size * (dp + ...))."""
    stages = [dist.get_global_rank(groups.pp, stage) for stage in range(groups.pp_size)]
    return [stage - groups.tp_rank + place for stage in stages for place in range(groups.tp_size)]
