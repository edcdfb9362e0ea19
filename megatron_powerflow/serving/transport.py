"""What must a way of giving servers weights do? By a folder (`by_folder.py`), or by a stream (`by_stream.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_powerflow.serving.manifest import Manifest
from megatron_powerflow.serving.server import Server, ServerError
from megatron_powerflow.serving.weight_sync import Sync


@dataclass(frozen=True, slots=True)
class Given:
    """What was given: the version, and on the main rank address -> what came of it, of each server."""

    manifest: Manifest
    outcomes: dict[str, Sync | ServerError] = field(default_factory=dict)


class Transport(Protocol):
    """A way of giving servers weights."""

    @property
    def needs_all(self) -> bool:
        """Whether every rank must take part for a server to get weights, also such as others have already."""

    def give(self, step: int, last: Manifest | None, servers: Sequence[Server], beat: Callable[[], None]) -> Given:
        """Give servers the policy as it is after so many steps, and prove it. Collective over the run.

        last: its version, where others have it already; None for a new one. servers: on the main rank. A server that
        does not take it has a ServerError as its outcome; one that takes it and computes something else raises
        NotProved, as does UserError what no server mends, on every rank.
        """

    def tidy(self) -> None:
        """Remove what no server needs any more. Collective."""

    def close(self) -> None:
        """Remove everything. On the main rank; nothing elsewhere."""
