"""A disk that takes its time, for tests of what goes on meanwhile: the command line, or a run on this rank.

    python -m tests.distributed.slow_disk SECONDS train CONFIG ...

The shards of each checkpoint are written so many seconds after the save began; everything else is as it is.
"""

from __future__ import annotations

import contextlib
import errno
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def slow_disk(seconds: float, *, full_at: str | None = None) -> Iterator[list[str]]:
    """Yield the names of the folders that were written, as they are. full_at: the folder that does not fit."""
    from megatron_powerflow.checkpoint.shards import HeldWriter

    write, written = HeldWriter.write, []

    def slowly(writer: HeldWriter) -> None:
        folder = Path(writer.path).parent.name
        time.sleep(seconds)
        if full_at is not None and folder.startswith(full_at):
            raise OSError(errno.ENOSPC, "No space left on device", str(writer.path))
        write(writer)
        written.append(folder)

    HeldWriter.write = slowly
    try:
        yield written
    finally:
        HeldWriter.write = write


def run_with_slow_disk(seconds: float, config_file: Path, *overrides: str, full_at: str | None = None) -> str:
    """What `powerflow train` does, on this rank; returns what it printed."""
    from tests.distributed.megatron_sessions import run_training

    with slow_disk(seconds, full_at=full_at):
        return run_training(config_file, *overrides)


if __name__ == "__main__":
    from megatron_powerflow.cli import main
    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    pause = float(sys.argv.pop(1))
    with slow_disk(pause):
        main()
