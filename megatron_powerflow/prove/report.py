"""What does a proof say, to people and to programs?

Left out: how it is made (`proof.py`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_powerflow.console import duration
from megatron_powerflow.prove.forks import Failure
from megatron_powerflow.prove.proof import Proof, Subject
from megatron_powerflow.targets import file_refusals

UNPROVEN = (
    "kernels of CUDA and Transformer Engine, bf16 and FP8, NCCL",
    "the real widths, depth and lengths; memory and speed",
    "that one process is right: `powerflow score` against another model's log-probs shows that",
)


def opening(subject: Subject) -> str:
    """Return the lines before the processes start."""
    return (
        f"layout    {subject.layout.describe()}\n"
        f"by        {subject.small.describe()}, on this machine's CPUs, against one process that pads"
    )


def progress(console: Console) -> Callable[[str], None]:
    """Return what prints each phase as it begins, with the seconds until then."""
    start = time.monotonic()
    return lambda phase: console.print(f"{time.monotonic() - start:6.0f} s  {phase}")


def table(proof: Proof) -> Table:
    """Return the lines of a proof as a table; it has none where the processes failed."""
    found = Table(box=None, padding=(0, 2, 0, 0))  # without lines it is whole in 80 columns
    for name in ("", "largest", "bound", "", "difference, and where"):
        found.add_column(name, justify="right" if name in ("largest", "bound") else "left", overflow="fold")
    for line in proof.lines:
        verdict = "holds" if line.holds else "DIFFERS"
        where = f"{line.unit}: {line.where}"
        found.add_row(line.name, _number(line.largest), _number(line.bound), verdict, where)
    return found


def closing(proof: Proof) -> str:
    """Return the lines behind the table: what failed, what was shrunk, what is not proven, the verdict."""
    lines = [] if proof.failure is None else _failure(proof.failure)
    lines += [f"shrunk    {text}" for text in _wrapped(proof.shrunk)]
    lines += [f"not shown {text}" for text in UNPROVEN]
    seconds = duration(proof.seconds)
    if proof.holds:
        return "\n".join([*lines, f"proved in {seconds}: {proof.small.describe()} computes what one process computes"])
    other = sum(not line.holds for line in proof.lines)
    why = "the processes failed" if proof.failure else f"{other} of {len(proof.lines)} lines differ"
    return "\n".join([*lines, f"NOT PROVED after {seconds}: {why}; do not submit this layout"])


def to_json(proof: Proof) -> dict[str, Any]:
    """Return the proof for programs. A difference that is not finite is None."""
    failure = proof.failure
    return {
        "holds": proof.holds,
        "layout": proof.layout.describe(),
        "proved_on": proof.small.describe(),
        "family": proof.architecture.family,
        "shrunk": list(proof.shrunk),
        "not_shown": list(UNPROVEN),
        "seconds": round(proof.seconds, 1),
        "lines": [
            {
                "name": line.name,
                "unit": line.unit,
                "largest": line.largest if math.isfinite(line.largest) else None,
                "bound": line.bound,
                "where": line.where,
                "holds": line.holds,
            }
            for line in proof.lines
        ],
        "failure": failure
        and {"part": failure.part, "rank": failure.rank, "phase": failure.phase, "words": list(failure.words)},
    }


def json_refusals(path: Path) -> list[str]:
    """Return why the file for programs may not be written; [] when it may: it is not there, or is such a file."""

    def is_ours(start: bytes) -> bool:
        try:
            values = json.loads(start)
        except (ValueError, RecursionError):
            return False
        return isinstance(values, dict) and {"holds", "proved_on", "lines", "failure"} <= values.keys()

    return file_refusals(path, is_ours, label="--json")


def _failure(failure: Failure) -> list[str]:
    lines = [f"failed    rank {failure.rank} of the part {failure.part!r}, as it {failure.phase}:"]
    return lines + [f"          {text}" for text in failure.words]


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _wrapped(texts: tuple[str, ...], width: int = 90) -> list[str]:
    """Return the texts, with commas, on lines of about this width."""
    lines: list[str] = [""]
    for text in texts:
        if lines[-1] and len(lines[-1]) + len(text) > width:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + text
    return lines
