"""Who answers which prompt? Servers take prompts from one queue, as many at a time as they are allowed.

A prompt whose server is lost, hangs, or answers with something else than an answer goes back into the queue and to
another server; whichever comes first answers it, and it is answered once. A server that was unreachable is asked for
its health until it is back; one that gave garbage or refused is asked again once it has been started anew. A server
takes prompts only while it has the weights that are wanted, and has proved it (`weight_sync.py`).

Left out: what a request and an answer hold (`answers.py`); what outlives a crash (`ledger.py`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_powerflow.console import duration
from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt, SamplingParams
from megatron_powerflow.serving.answers import MODEL, ROUTE, Answer, read_answer, request_of
from megatron_powerflow.serving.server import Refused, Server, ServerError, Unreachable

HEALTH_SECONDS = 2.0  # between two looks at the servers
START_SECONDS = 1800.0  # that servers of the job may take until the first one answers: they load a model, and compile
TELL_SECONDS = 60.0  # between two words of it, while no server can be asked
RETRY_SECONDS = 10.0  # before weights are offered again to a server that did not take them
REFUSALS = 4  # of one prompt, by whatever servers, before the run ends for it
HEALTH_TRIES = 2  # without an answer in a row, before a server counts as hung
FRESH = "default"  # what vLLM calls the weights that it was started with
SHOWN_TROUBLE = 300  # characters of what went wrong with a server, in a message


class UnwantedVersion(ServerError):
    """An answer was written by weights that are not wanted any more, or by somebody else's."""


class NoServer(Exception):
    """No server could be asked for longer than is waited. Its text says what is wrong with each."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt to be answered, and what is done with its answer (in a thread of a server)."""

    slot: int
    prompt: Prompt
    sampling: SamplingParams
    took: Callable[[Answer, str], None]  # the answer, and the address of who gave it; raises UnwantedVersion


NOT_YET = "not asked yet"  # or not since the last weights: no trouble that anybody must hear of


@dataclass
class _Member:
    """A server and how it is. trouble: why it is not asked; "" while it is. for_good: until it was started anew."""

    server: Server
    trouble: str = NOT_YET
    for_good: bool = False
    num_open: int = 0
    missed: int = 0
    is_coming: bool = False
    threads: list[threading.Thread] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """vocab_size: token ids are below it. max_requests: prompts that one server answers at a time. answer_seconds:
    without an answer to a prompt, before its server counts as hung. wait_seconds: without any server, before it is
    given up."""

    vocab_size: int
    max_requests: int
    answer_seconds: float
    wait_seconds: float


class Pool:
    """The servers of a run. Its threads run from `open` to `close`.

    find: the addresses that there are by now, asked again and again. bring_up: gives a server the wanted weights where
    it has others, and proves them; raises ServerError where it cannot. restart: asks for one to be started anew, by
    its address. say: for people, called when a server is lost or found.
    """

    def __init__(
        self,
        find: Callable[[], Sequence[str]],
        settings: PoolSettings,
        *,
        bring_up: Callable[[Server], None],
        restart: Callable[[str], object],
        say: Callable[[str], None],
    ) -> None:
        self._find, self._settings, self._bring_up, self._say = find, settings, bring_up, say
        self._restart = restart
        self._members: dict[str, _Member] = {}
        self._queue: deque[Ask] = deque()
        self._changed = threading.Condition()
        self._held, self._closed = True, False
        self._refused: Counter[tuple[int, SamplingParams]] = Counter()
        self.bringing = threading.Lock()  # held by whoever gives a server weights
        self._broken: BaseException | None = None
        self._lost_since: float | None = time.monotonic()
        self._was_up = False  # whether any server ever was
        self._told_at = -TELL_SECONDS
        self._watch = threading.Thread(target=self._look_after, name="servers", daemon=True)

    def open(self) -> None:
        """Begin to look for servers."""
        self._watch.start()

    def close(self) -> None:
        """Ask nobody any more, and end what is being asked."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for member in list(self._members.values()):
            member.server.drop()

    def ask(self, asks: Sequence[Ask], *, first: bool = False) -> None:
        """Queue prompts. They are answered in the background, in order; first: before all that wait already."""
        with self._changed:
            if first:
                self._queue.extendleft(reversed(asks))
            else:
                self._queue.extend(asks)
            self._changed.notify_all()

    def known(self) -> list[Server]:
        """Return the servers that can be given weights: all but those that must be started anew first.

        They are looked for if there are none yet.
        """
        for url in self._find():
            self._meet(url)
        members = list(self._members.values())
        return [member.server for member in members if not member.for_good or self._is_fresh(member.server)]

    def set_up(self, urls: Sequence[str]) -> None:
        """Note which servers have the wanted weights; the others have not, whatever they were."""
        for url in urls:
            self._meet(url)
        with self._changed:
            for url, member in self._members.items():
                if url in urls:
                    member.trouble, member.for_good, member.missed = "", False, 0
                elif not member.trouble:
                    member.trouble = NOT_YET
            self._lost_since = None if urls else self._lost_since or time.monotonic()
            self._was_up = self._was_up or bool(urls)

    def troubles(self) -> dict[str, str]:
        """Return address -> why it is not asked, of the servers that are not."""
        return {url: member.trouble for url, member in list(self._members.items()) if member.trouble}

    def require_sound(self) -> None:
        """Raise what a thread met that no other server mends: a bug, a full disk, other weights than the trainer's."""
        if self._broken is not None:
            raise self._broken

    def require_some(self, *, at_once: bool = False) -> None:
        """Raise NoServer where none could be asked for longer than is waited; at_once: where there is none now."""
        limit = 0.0 if at_once else self._limit
        if (seconds := self._seconds_without()) is not None and seconds > limit:
            raise NoServer(f"no vLLM server could be asked for {limit:g} s: {self._whats_wrong()}")

    @property
    def _limit(self) -> float:
        """Seconds without any server before it is given up."""
        return self._settings.wait_seconds if self._was_up else max(self._settings.wait_seconds, START_SECONDS)

    def _seconds_without(self) -> float | None:
        """Return for how long no server could be asked; None where one can, or where none is to be."""
        with self._changed:
            return None if self._held or self._lost_since is None else time.monotonic() - self._lost_since

    def _whats_wrong(self) -> str:
        each = "; ".join(f"{url}: {trouble}" for url, trouble in self.troubles().items())
        return each or "none was ever there; `powerflow serve` starts them"

    def hold(self) -> None:
        """Take no more prompts from the queue."""
        with self._changed:
            self._held = True

    @property
    def num_open(self) -> int:
        """How many prompts servers are busy with."""
        return sum(member.num_open for member in list(self._members.values()))

    def release(self) -> None:
        """Go on after `hold`."""
        with self._changed:
            self._held = False
            if self._lost_since is not None:
                self._lost_since = time.monotonic()
            self._changed.notify_all()

    def lose(self, url: str, why: str, *, for_good: bool) -> None:
        """Ask a server no more. for_good: until it was started anew. The first reason is the one that is told."""
        why = why[:SHOWN_TROUBLE]
        with self._changed:
            member = self._members[url]
            is_news = member.trouble in ("", NOT_YET)
            member.trouble = why if is_news else member.trouble
            asks_restart = for_good and not member.for_good
            member.for_good = member.for_good or for_good
            if not any(not other.trouble for other in self._members.values()):
                self._lost_since = self._lost_since or time.monotonic()
        member.server.drop()  # what else it was asked goes to another one
        if asks_restart:
            with contextlib.suppress(OSError):  # a disk that refuses that refuses the run's own files, too
                self._restart(url)
        if is_news or asks_restart:
            self._tell(f"vLLM server {url} is left out: {why}")

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone is no fault of a server
            self._say(text)

    def _take(self, member: _Member) -> Ask | None:
        """Wait for a prompt that this server may answer; None when the pool closes."""
        with self._changed:
            while not self._closed and (self._held or member.trouble or not self._queue):
                self._changed.wait()
            if self._closed:
                return None
            member.num_open += 1
            return self._queue.popleft()

    def _serve(self, member: _Member) -> None:
        """A thread: one of the prompts at a time that a server answers."""
        while (ask := self._take(member)) is not None:
            try:
                self._answer(member.server, ask)
            except BaseException as error:
                self._not_answered(member, ask, error)
            finally:
                with self._changed:
                    member.num_open -= 1
                    self._changed.notify_all()

    def _not_answered(self, member: _Member, ask: Ask, error: BaseException) -> None:
        """Put a prompt back for another server; for the main thread: a bug, a full disk, a prompt that none takes."""
        if not isinstance(error, ServerError):
            self._broken = error
            return
        with self._changed:
            self._queue.appendleft(ask)
            self._refused[ask.slot, ask.sampling] += isinstance(error, Refused)
            refusals = self._refused[ask.slot, ask.sampling]
        if refusals >= REFUSALS:
            self._broken = UserError(f"prompt {ask.prompt.id} was refused {refusals} times, the last time by {error}")
        mended = isinstance(error, Unreachable | UnwantedVersion)  # by waiting, or by its weights
        self.lose(member.server.url, str(error), for_good=not mended)

    def _answer(self, server: Server, ask: Ask) -> None:
        body = request_of(ask.slot, ask.prompt, ask.sampling, MODEL)
        reply = server.post(ROUTE, body, seconds=self._settings.answer_seconds)
        where = f"{server.url}, prompt {ask.prompt.id}"
        vocab_size = self._settings.vocab_size
        answer = read_answer(reply, ask.slot, ask.prompt, ask.sampling, vocab_size=vocab_size, where=where)
        ask.took(answer, server.url)

    def _look_after(self) -> None:
        """A thread: are there new servers, do the old ones live, are lost ones back?"""
        while not self._closed:
            try:
                there = self._find()
                for url in there:
                    self._meet(url)
                for member in list(self._members.values()):
                    if member.server.url in there:
                        self._look_at(member)
                    elif not member.trouble:
                        self.lose(member.server.url, "has ended, by what its announcement says", for_good=False)
            except BaseException as error:
                self._broken = error
                return
            self._tell_of_waiting()
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=HEALTH_SECONDS)

    def _tell_of_waiting(self) -> None:
        """Say from time to time that no server can be asked, and what is wrong with each."""
        seconds, now = self._seconds_without(), time.monotonic()
        if seconds is None or min(seconds, now - self._told_at) < TELL_SECONDS:
            return
        self._told_at = now
        self._tell(
            f"no vLLM server could be asked for {duration(seconds)}; the run waits for one, {duration(self._limit)} at "
            f"most: {self._whats_wrong()}"
        )

    def _meet(self, url: str) -> None:
        """Take a server in, unless it is known."""
        with self._changed:
            if url in self._members:
                return
            member = self._members[url] = _Member(Server(url))
        for number in range(self._settings.max_requests):
            thread = threading.Thread(target=self._serve, args=(member,), name=f"{url}-{number}", daemon=True)
            member.threads.append(thread)
            thread.start()

    def _look_at(self, member: _Member) -> None:
        healthy = member.server.is_healthy()
        member.missed = 0 if healthy else member.missed + 1
        if member.missed >= HEALTH_TRIES:  # also where somebody waits for it to take weights
            self.lose(member.server.url, "does not answer /health: it hangs or is gone", for_good=False)
        if not member.trouble:
            return
        if healthy and not self._held and not member.is_coming:
            member.is_coming = True  # in a thread of its own: others are looked after meanwhile
            threading.Thread(target=self._bring_up_again, args=(member,), name=member.server.url, daemon=True).start()

    def _bring_up_again(self, member: _Member) -> None:
        """A thread: give a server that was lost, or came later, the wanted weights, and take it in again."""
        url = member.server.url
        try:
            if not member.for_good or self._is_fresh(member.server):
                self._bring_up_now(member)
        except Unreachable as error:
            member.trouble = str(error)[:SHOWN_TROUBLE]
        except ServerError as error:
            member.for_good = False  # it has been started anew since, or never had them: it is asked to be, once more
            self.lose(url, str(error), for_good=True)
            time.sleep(RETRY_SECONDS)  # in this thread: the member is looked at again after that
        except BaseException as error:  # weights that are not the trainer's, or a bug: for the main thread
            self._broken = error
        finally:
            member.is_coming = False

    def _bring_up_now(self, member: _Member) -> None:
        with self.bringing:
            if self._held or not member.trouble:  # while it waited for the others
                return
            self._bring_up(member.server)
            self.take_in(member.server.url)

    def take_in(self, url: str) -> None:
        """Ask a server again that has the wanted weights."""
        member = self._members[url]
        with self._changed:
            member.trouble, member.for_good, member.missed = "", False, 0
            self._lost_since, self._was_up = None, True
            self._changed.notify_all()
        self._tell(f"vLLM server {url} answers")

    def _is_fresh(self, server: Server) -> bool:
        """Whether a server that must be started anew was."""
        try:
            return server.weight_version() == FRESH
        except ServerError:
            return False
