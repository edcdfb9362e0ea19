"""What does a rank say of itself and of its groups? Small records, which travel as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Card:
    """What a rank says when it comes. node: SLURM's name of it, else the host's. backend: nccl or gloo.

    fault: why it has no device of its own. device: its GPU's name, unique in the world; empty on a CPU.
    """

    node: str
    backend: str
    fault: str = ""
    device: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """All-reduces of one group, as one of its ranks saw them, in seconds: the fastest of some.

    small_seconds: of one number; large_seconds: of LARGE_BYTES. is_right: whether each sum was the number of ranks.
    """

    kind: str
    ranks: tuple[int, ...]
    small_seconds: float
    large_seconds: float
    is_right: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank has found. product_seconds: of some matrix products on its device, the fastest of some.

    taken_bytes: of the GPU's memory, by others, before this rank took any; None on a CPU. seen: the paths of the config
    that it sees.
    """

    rank: int
    node: str
    product_seconds: float
    taken_bytes: int | None = None
    seen: tuple[str, ...] = ()
    groups: tuple[Measured, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the pre-flight ends, on every rank. lines: what is wrong, for people; nodes: those to keep out, by name."""

    exit_code: int = 0
    lines: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    table: dict = field(default_factory=dict)  # what was measured, for programs

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str | bytes) -> Verdict:
        values = json.loads(text)
        return Verdict(values["exit_code"], tuple(values["lines"]), tuple(values["nodes"]), values["table"])


def card_of_json(text: str | bytes) -> Card:
    return Card(**json.loads(text))


def report_of_json(text: str | bytes) -> Report:
    values = json.loads(text)
    groups = tuple(Measured(**{**group, "ranks": tuple(group["ranks"])}) for group in values.pop("groups"))
    return Report(**{**values, "seen": tuple(values["seen"])}, groups=groups)
