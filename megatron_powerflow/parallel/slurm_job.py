"""What does SLURM say of the job that this process belongs to? Its number, how often it began, its end and nodes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class Job:
    """The SLURM job that this process belongs to. restarts: how often it was put back into the queue and begun anew."""

    id: str
    restarts: int


def read_job() -> Job | None:
    """None outside SLURM."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return Job(job, int(restarts) if restarts.isdecimal() else 0) if job else None


def read_job_end() -> float | None:
    """When SLURM ends this process's job, in seconds since 1970; None outside SLURM, and for a job without a limit."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    if text.isdecimal():
        return float(text)
    try:  # before SLURM 23.02
        lines = subprocess.run(
            ["scontrol", "show", "job", job], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return end_of_job(lines)


def end_of_job(lines: str) -> float | None:
    """EndTime of what `scontrol show job` prints, in local time; None where it knows none."""
    words = [word.removeprefix("EndTime=") for word in lines.split() if word.startswith("EndTime=")]
    limits = [word for word in lines.split() if word.startswith("TimeLimit=")]
    try:
        return None if limits == ["TimeLimit=UNLIMITED"] else datetime.fromisoformat(words[0]).timestamp()
    except (IndexError, ValueError):
        return None


def node_name() -> str:
    """Return the name of this node: SLURM's, which its commands take, where there is one, else the host's own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def step_node_names() -> list[str]:
    """Return the names of the nodes of the srun step that this process belongs to, in order; [] outside a step."""
    return expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))


def expand_nodes(text: str) -> list[str]:
    """Return the nodes of a list as SLURM writes it: `n[1-2,07],login` is n1, n2, n07, login."""
    found = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]*)(?:\[([^\]]*)\])?([^,\[\]]*)(?:,|$)", text):
        numbers = [number for part in ranges.split(",") for number in _numbers(part)] if ranges else [""]
        found += [f"{prefix}{number}{suffix}" for number in numbers]
    return [name for name in found if name]


def _numbers(part: str) -> list[str]:
    """07-10 -> 07, 08, 09, 10."""
    first, _, last = part.partition("-")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
