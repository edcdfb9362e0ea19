"""What does a server need to know of an update? Where its tensors are, what they should be, and how to prove it.

Left out: who writes the files (`weight_writer.py`), who sends them (`weight_sync.py`). Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Changes:
    """A folder of the bytes that changed from one version to the next."""

    base: str
    version: str
    folder: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Texts, and the trainer's log-probs of their tokens but the first, at temperature 1: what a server must agree
    with. bound: nats per token, on the mean."""

    token_ids: tuple[tuple[int, ...], ...]
    log_probs: tuple[tuple[float, ...], ...]
    bound: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """One version of the policy's weights.

    step: how many steps have made it. folder: safetensors files of all tensors, as they were at `folder_version`; ""
    where the weights are on no disk and the run's ranks send them. changes: what has changed since, oldest first.
    checksums: of the tensors as they are now, by Hugging Face name. num_bytes: that each server is given of this
    version; whole_bytes: what all tensors take. keeps_copy: changes will come, so a server keeps a copy to apply them
    to.
    """

    version: str
    step: int
    folder: str
    folder_version: str
    changes: tuple[Changes, ...]
    checksums: dict[str, str] = field(repr=False)
    probe: Probe = field(repr=False)
    num_bytes: int
    whole_bytes: int
    keeps_copy: bool


def version_of(run_id: str, step: int) -> str:
    """Name the weights of a run after so many steps, apart from those of any other run."""
    return f"{run_id}/{step}"


def step_of(version: str, run_id: str) -> int | None:
    """Return the step of a version of this run; None for other weights."""
    theirs, _, step = version.rpartition("/")
    return int(step) if theirs == run_id and step.isdecimal() else None
