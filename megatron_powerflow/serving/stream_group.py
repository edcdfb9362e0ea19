"""How does the main rank reach the workers of several servers at once? By a process group that it makes for one update.

    open     every server is asked to take an update; once all of their workers have come, the group is made
    put      a frame of tensors to all of them
    finish   the end; then each server says for itself what came of it

A server that does not come is left out, and the others are asked once more: nothing has happened to their layers yet.
Where one is lost after that, no server of the group has all the tensors, and each is to be started anew. No call here
waits for longer than a message may take: whatever hangs is left to a thread of its own.

Left out: the frames and the group itself (`on_server/powerflow_weight_stream.py`), where tensors come from
(`weight_sender.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address

import torch
import torch.distributed as dist

from megatron_powerflow.serving.at_once import BEAT_SECONDS
from megatron_powerflow.serving.on_server.powerflow_weight_stream import (
    GO,
    JOINED,
    STOP,
    WORD,
    Frame,
    Group,
    Place,
    join,
    put_frame,
)
from megatron_powerflow.serving.server import Garbage, Server, ServerError, Unreachable
from megatron_powerflow.serving.weight_sync import UpdateFailed

LOOK_SECONDS = 0.05  # between two looks at who has come
SHOWN_CHARACTERS = 200  # of what a group broke by


@dataclass(frozen=True, slots=True)
class Receiver:
    """A server that is to take an update. num_workers: its processes with a part of the model each. address: under
    which it reaches this machine."""

    server: Server
    num_workers: int
    address: str


class StreamGroup:
    """One update, for the main rank.

    ask: has a server take the update of a place, its first worker by a rank, and returns once it has; raises
    ServerError. device: of the tensors. seconds: that a message may take, and workers to come. beat: shows life.
    """

    def __init__(
        self,
        ask: Callable[[Server, Place, int], None],
        device: torch.device,
        *,
        seconds: float,
        beat: Callable[[], None],
    ) -> None:
        self._ask, self._device, self._seconds, self._beat = ask, device, seconds, beat
        self._group: Group | None = None
        self._tries: dict[str, Future] = {}
        self._servers: dict[str, Server] = {}
        self._failures: dict[str, ServerError] = {}
        self._speaker: ThreadPoolExecutor | None = None  # who speaks in the group

    def open(self, receivers: Sequence[Receiver]) -> None:
        """Make the group with those that come. Never raises for a server: `finish` says what became of each."""
        self._servers = {receiver.server.url: receiver.server for receiver in receivers}
        while left := [receiver for receiver in receivers if receiver.server.url not in self._failures]:
            if self._met(left):
                return

    def _met(self, receivers: Sequence[Receiver]) -> bool:
        """One try. Where it is none, at least one more server has failed."""
        address = _address_for_all([receiver.address for receiver in receivers])
        seconds = timedelta(seconds=self._seconds)
        store = dist.TCPStore(address, 0, None, True, timeout=seconds, wait_for_workers=False)
        place = Place(address, store.port, 1 + sum(receiver.num_workers for receiver in receivers), self._seconds)
        self._tries, keys, rank = {}, {}, 1
        with_threads = ThreadPoolExecutor(len(receivers))
        for receiver in receivers:
            url = receiver.server.url
            self._tries[url] = with_threads.submit(self._ask, receiver.server, place, rank)
            keys[url] = [JOINED.format(rank=rank + worker) for worker in range(receiver.num_workers)]
            rank += receiver.num_workers
        with_threads.shutdown(wait=False)  # takes no more; those go on
        if self._all_came(store, keys):
            store.set(WORD, GO)
            self._speaker = ThreadPoolExecutor(1)
            self._speak(lambda: join(store, place, 0, self._device))
            return True
        absent = [url for url in keys if self._tries[url].done() or not store.check(keys[url])]
        store.set(WORD, STOP)
        for url in absent:
            self._failures[url] = self._failure_of(url) or Unreachable(
                f"{url}: its workers did not come to {address}, port {store.port}, within {self._seconds:g} s; they "
                "must reach that address of the trainer"
            )
            self._servers[url].drop()
        self._wait_for(self._tries.values())  # each ends by that word, or was dropped
        return False

    def _all_came(self, store: dist.Store, keys: dict[str, list[str]]) -> bool:
        """Wait for every worker; False as soon as a server has failed, or time is up."""
        began, wanted = time.monotonic(), [key for own in keys.values() for key in own]
        while time.monotonic() - began < self._seconds:
            if any(future.done() for future in self._tries.values()):
                return False
            if store.check(wanted):
                return True
            self._beat()
            time.sleep(LOOK_SECONDS)
        return False

    def put(self, frame: Frame | None) -> None:
        """Send a frame, or None for the end, to all. Does nothing without a group, or once it broke."""
        if (group := self._group) is None:
            return
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the frame is there before another thread sends it
        self._speak(lambda: put_frame(frame, group.broadcast, self._device))

    def _speak(self, call: Callable[[], Group | None]) -> None:
        """Do something in the group, in a thread; what it breaks by, or takes too long, ends the group."""
        assert self._speaker is not None
        device = self._device

        def on_device() -> Group | None:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            return call()

        began, future = time.monotonic(), self._speaker.submit(on_device)
        while not future.done():
            wait([future], timeout=BEAT_SECONDS)
            self._beat()
            if not future.done() and (lost := [error for url in self._tries if (error := self._failure_of(url))]):
                self._break(str(lost[0]))
                return
            if time.monotonic() - began > 2 * self._seconds:
                self._break(f"a message took more than {2 * self._seconds:g} s")
                return
        try:
            self._group = future.result() or self._group
        except RuntimeError as error:  # of gloo and NCCL: no class of their own
            self._break(str(error).partition("\n")[0])

    def _break(self, why: str) -> None:
        """End the group. No server of it has all tensors."""
        self.close()
        for url in self._tries:
            self._failures[url] = UpdateFailed(
                f"{url}: the weights broke off on their way ({why[:SHOWN_CHARACTERS]}): it is to be started anew, with "
                "the command of `powerflow vllm-args`"
            )
            self._servers[url].drop()

    def close(self) -> None:
        """End the group: servers that wait in it for more fail at once."""
        group, self._group = self._group, None
        speaker, self._speaker = self._speaker, None
        if group is not None:
            group.close()
        if speaker is not None:
            speaker.shutdown(wait=False)

    def finish(self) -> dict[str, ServerError | None]:
        """Send the end; return address -> None for each server that has taken everything, or what it failed with."""
        self.put(None)
        if self._group is not None:
            self._wait_for(self._tries.values())
            for url in self._tries:
                if (failure := self._failure_of(url)) is not None:  # one that only hung has lost tensors, too
                    self._failures[url] = failure if isinstance(failure, UpdateFailed) else UpdateFailed(str(failure))
        self.close()
        return {url: self._failures.get(url) for url in self._servers}

    def _wait_for(self, futures: Iterable[Future]) -> None:
        while wait(futures, timeout=BEAT_SECONDS).not_done:
            self._beat()

    def _failure_of(self, url: str) -> ServerError | None:
        """What a server that is done failed with. Raises what is no failure of a server."""
        future = self._tries[url]
        if not future.done():
            return None
        error = future.exception()
        if error is None:
            return None if self._group is not None else Garbage(f"{url}: says it has the weights; they were not sent")
        if not isinstance(error, ServerError):
            raise error
        return error


def _address_for_all(addresses: Sequence[str]) -> str:
    """The address under which all servers reach this machine: that of a network, where one of them is in it, for all
    workers speak to each other; the machine's own servers reach it, too."""
    outside = [address for address in addresses if not ip_address(address.partition("%")[0]).is_loopback]
    return outside[0] if outside else addresses[0]
