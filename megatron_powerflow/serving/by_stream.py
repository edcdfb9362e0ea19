"""How do servers get weights that are on no disk? All ranks gather them, and the main rank sends them on as they come.

    1  each server is paused; those that have the version already need no more than its proof
    2  a process group with the workers of the others (`stream_group.py`)
    3  every tensor once (`weight_sender.py`): into the group, and into the version's checksums
    4  each server goes on, and proves the version

A server that comes back between two versions gets the weights by the same four steps, with itself alone in the group:
the policy is the same until the next update. So every rank must take part, and it waits until they all can.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, raise_together
from megatron_powerflow.serving.at_once import on_all
from megatron_powerflow.serving.manifest import Manifest, Probe
from megatron_powerflow.serving.on_server.powerflow_weight_stream import Place, own_address
from megatron_powerflow.serving.server import Server, ServerError, Unreachable
from megatron_powerflow.serving.stream_group import Receiver, StreamGroup
from megatron_powerflow.serving.transport import Given
from megatron_powerflow.serving.weight_sender import WeightSender
from megatron_powerflow.serving.weight_sync import UNPROVED, Sync, confirm, num_workers, pause, take_stream
from megatron_powerflow.serving.weight_totals import Totals

MESSAGE_SECONDS = 120.0  # that a message to the workers may take, and that they may take to come


class StreamTransport:
    """A transport over a process group, NCCL on GPUs and gloo elsewhere.

    sender: of the policy. version_of: names a version by its step. probe: its texts, scored by the policy; collective.
    prepare: makes a server ready to take weights. seconds: that it may take to load them, without a message.
    message_seconds: that a message may take.
    """

    needs_all = True

    def __init__(
        self,
        groups: Groups,
        sender: WeightSender,
        version_of: Callable[[int], str],
        probe: Callable[[], Probe],
        *,
        prepare: Callable[[Server], None],
        seconds: float,
        message_seconds: float = MESSAGE_SECONDS,
    ) -> None:
        self._groups, self._sender, self._version_of, self._probe = groups, sender, version_of, probe
        self._prepare, self._seconds, self._message_seconds = prepare, seconds, message_seconds

    def give(self, step: int, last: Manifest | None, servers: Sequence[Server], beat: Callable[[], None]) -> Given:
        """As `Transport.give`."""
        began = time.monotonic()
        version = self._version_of(step)
        probe = last.probe if last is not None else self._probe()
        ready: dict[str, Receiver | ServerError | None] = {}
        failure = None
        if self._groups.is_main:
            failure = attempt(lambda: ready.update(self._ready(servers, version, beat)), UserError)
        raise_together(failure, str, self._groups)
        totals, failures = self._send(version, [one for one in ready.values() if isinstance(one, Receiver)], beat)
        failures |= {url: one for url, one in ready.items() if isinstance(one, ServerError)}
        if last is not None and last.checksums != totals.checksums:
            raise AssertionError(f"the policy is another one than it was as {version}")
        given = (totals.checksums, probe, totals.num_bytes, totals.whole_bytes)
        manifest = last if last is not None else Manifest(version, step, "", "", (), *given, keeps_copy=False)
        took = time.monotonic() - began
        outcomes: dict[str, Sync | ServerError] = {**failures}

        def prove() -> None:
            takers = [server for server in servers if server.url not in failures]
            confirmed = on_all(takers, lambda server: confirm(server, manifest, seconds=self._seconds), beat)
            for url, proof in confirmed.items():
                outcomes[url] = proof if isinstance(proof, ServerError) else Sync(proof, took, as_changes=False)

        failure = attempt(prove, UserError) if self._groups.is_main else None
        raise_together(failure, str, self._groups)
        return Given(manifest, outcomes)

    def _ready(
        self, servers: Sequence[Server], version: str, beat: Callable[[], None]
    ) -> dict[str, Receiver | ServerError | None]:
        """Have servers wait for weights; None for those that have the version."""

        def ready(server: Server) -> Receiver | None:
            self._prepare(server)
            if server.weight_version().removesuffix(UNPROVED) == version:
                return None
            pause(server)
            try:
                address = own_address(server.host)
            except OSError as error:
                raise Unreachable(f"{server.url}: no way leads there from this machine: {error}") from None
            return Receiver(server, num_workers(server), address)

        return on_all(servers, ready, beat)

    def _send(
        self, version: str, receivers: Sequence[Receiver], beat: Callable[[], None]
    ) -> tuple[Totals, dict[str, ServerError]]:
        """Send the policy to servers; return what it is, and those that have not got it. Collective."""

        def ask(server: Server, place: Place, rank: int) -> None:
            stream = {**asdict(place), "first_rank": rank}
            take_stream(server, version, self._sender.names, stream, seconds=self._seconds)

        group = StreamGroup(ask, self._groups.device, seconds=self._message_seconds, beat=beat)
        try:
            group.open(receivers)
            totals = self._sender.send(group.put, beat)
            return totals, {url: failure for url, failure in group.finish().items() if failure is not None}
        finally:
            group.close()

    def tidy(self) -> None:
        """Do nothing: nothing is on a disk."""

    def close(self) -> None:
        """Do nothing: a group ends with its update."""
