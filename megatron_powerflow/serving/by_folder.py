"""How do servers get weights by a shared folder? All ranks write them, and each server reads them as it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.device_memory import give_back
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, raise_together
from megatron_powerflow.serving.at_once import on_all
from megatron_powerflow.serving.manifest import Manifest
from megatron_powerflow.serving.server import Server, ServerError
from megatron_powerflow.serving.transport import Given
from megatron_powerflow.serving.weight_sync import Sync, bring
from megatron_powerflow.serving.weight_writer import WeightWriter


class FolderTransport:
    """A transport over a folder. What is on the disk can be given to one more server by the main rank alone.

    publish: writes the weights after so many steps; collective. prepare: makes a server ready to take some. seconds:
    that it may take to load them. shares_gpus: servers are on the trainer's, which gives back what it does not use.
    """

    needs_all = False

    def __init__(
        self,
        groups: Groups,
        writer: WeightWriter,
        publish: Callable[[int], Manifest],
        *,
        prepare: Callable[[Server], None],
        seconds: float,
        shares_gpus: bool,
    ) -> None:
        self._groups, self._writer, self._publish = groups, writer, publish
        self._prepare, self._seconds, self._shares_gpus = prepare, seconds, shares_gpus

    def give(self, step: int, last: Manifest | None, servers: Sequence[Server], beat: Callable[[], None]) -> Given:
        """As `Transport.give`."""
        manifest = last if last is not None else self._publish(step)
        outcomes: dict[str, Sync | ServerError] = {}
        if self._shares_gpus:
            give_back(self._groups.device)

        def to(server: Server) -> Sync:
            self._prepare(server)
            return bring(server, manifest, seconds=self._seconds)

        failure = None
        if self._groups.is_main:
            failure = attempt(lambda: outcomes.update(on_all(servers, to, beat)), UserError)
        raise_together(failure, str, self._groups)
        return Given(manifest, outcomes)

    def tidy(self) -> None:
        """Remove folders that the last version does not name."""
        self._writer.forget_older()

    def close(self) -> None:
        """Remove the folder of this start."""
        self._writer.close()
