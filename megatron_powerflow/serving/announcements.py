"""How do a run and the servers of its job find each other? By files in RUN/servers, one of each server.

    RUN/servers/HOST-PORT.json      {"url": ..., "started": ..., "pid": ...}, written when the server answers
    RUN/servers/HOST-PORT.restart   the trainer's wish that it be started anew: holds the `started` that it means

Left out: who writes them (`supervisor.py`), who asks the servers (`pool.py`). Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_powerflow.checkpoint.folder import SERVERS_NAME
from megatron_powerflow.errors import UserError
from megatron_powerflow.serving.server import require_url
from megatron_powerflow.whole_files import ordinary, write_file

NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}-\d{1,5}")
MAX_BYTES = 10_000


@dataclass(frozen=True, slots=True)
class Announcement:
    """A server that answers at `url`. started: names this start of it."""

    url: str
    started: str
    pid: int


def write_announcement(run: Path, name: str, announcement: Announcement) -> None:
    """Say that a server answers. Raises OSError."""
    (run / SERVERS_NAME).mkdir(parents=True, exist_ok=True)
    write_file(run / SERVERS_NAME / f"{name}.json", json.dumps(asdict(announcement)).encode())


def remove_announcement(run: Path, name: str) -> None:
    """Take it back: the server has ended."""
    for suffix in (".json", ".restart"):
        (run / SERVERS_NAME / f"{name}{suffix}").unlink(missing_ok=True)


def read_announcements(run: Path) -> dict[str, Announcement]:
    """Return name -> announcement of the servers that answer, as far as their files can be read."""
    found: dict[str, Announcement] = {}
    folder = run / SERVERS_NAME
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        if not NAME.fullmatch(path.stem):
            continue
        with contextlib.suppress(
            OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, UserError, RecursionError
        ):
            with ordinary(path).open("rb") as file:
                values = json.loads(file.read(MAX_BYTES))
            found[path.stem] = Announcement(require_url(values["url"]), str(values["started"]), int(values["pid"]))
    return found


def ask_restart(run: Path, url: str) -> bool:
    """Ask for a server to be started anew; False where it is not one of this job's. Raises OSError."""
    for name, announcement in read_announcements(run).items():
        if announcement.url == url:
            write_file(run / SERVERS_NAME / f"{name}.restart", announcement.started.encode())
            return True
    return False


def restart_is_asked(run: Path, name: str, started: str) -> bool:
    """Whether this start of a server is to end."""
    try:
        with ordinary(run / SERVERS_NAME / f"{name}.restart").open("rb") as file:
            return file.read(MAX_BYTES).decode(errors="replace").strip() == started
    except OSError:
        return False
