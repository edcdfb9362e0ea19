"""How does a command speak? In plain text: a path is shown as it is and is never wrapped.

Left out: the words themselves; errors, which go to stderr (`cli/leaving.py`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import IO

from rich.console import Console

QUIET_SECONDS = 60.0  # between two lines where there is no terminal, at most


def make_console(file: IO[str] | None = None, *, width: int | None = None) -> Console:
    """Make a console that prints to stdout, or to `file`. A `[bracket]` or a `:word:` in a path is text, not markup."""
    return Console(file=file, width=width, markup=False, emoji=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Write seconds for people. Example: 42 s, 7 min, 3.5 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 59.5 * 60 else f"{seconds / 3600:.1f} h"


class Heartbeat:
    """Prints `line()` when a minute has passed without a line, so that a log shows what takes long.

    A context. It prints nothing on a terminal, where a bar shows it. line: called in another thread; returns "" when
    there is nothing to print. Whoever prints in between calls `spoke`.
    """

    def __init__(self, console: Console, line: Callable[[], str], *, quiet_seconds: float = QUIET_SECONDS) -> None:
        self._console, self._line, self._quiet_seconds = console, line, quiet_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.spoke()

    def start(self) -> Heartbeat:
        """Start the thread, unless this is a terminal."""
        if not self._console.is_terminal:
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def __enter__(self) -> Heartbeat:
        return self.start()

    def __exit__(self, *_) -> None:
        self.close()

    def spoke(self) -> None:
        """Note that a line was printed just now: the next one is due in a minute."""
        self._due = time.monotonic() + self._quiet_seconds

    def _beat(self) -> None:
        while not self._ended.wait(max(0.0, self._due - time.monotonic())):
            if time.monotonic() < self._due:
                continue
            if line := self._line():
                self._console.print(line)
            self.spoke()
