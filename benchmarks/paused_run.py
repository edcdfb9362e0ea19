"""`powerflow train` that pauses in one phase of its second step, so that a signal can meet it there. For `endings.py`.

    python -m benchmarks.paused_run PHASE MARK train CONFIG [section.key=value ...]

PHASE: loading, generating, updating, saving or writing (a checkpoint, in a thread). MARK: a file that the main rank
makes when the pause begins.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAUSE_SECONDS = 8.0


def main() -> None:
    """Plant the pause and run the command line."""
    phase, mark, sys.argv[1:] = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    from megatron_powerflow.cli import main as run_the_command_line
    from megatron_powerflow.cli import runs
    from megatron_powerflow.parallel.initialize import prepare_imports
    from megatron_powerflow.parallel.launch import read_launch

    is_main = read_launch().is_main

    def paused(function: Callable[..., Any], times: int) -> Callable[..., Any]:
        """The function, which pauses before it does anything when it is called for the last of `times` times."""
        calls = 0

        def wait_and_call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == times:
                if is_main:
                    mark.touch()
                time.sleep(PAUSE_SECONDS)
            return function(*args, **kwargs)

        return wait_and_call

    def plant() -> None:
        from megatron_powerflow import train
        from megatron_powerflow.checkpoint.saving import Saver
        from megatron_powerflow.rollout.megatron_engine import MegatronEngine
        from megatron_powerflow.training import step

        if phase == "loading":
            train.build_session = paused(train.build_session, 1)
        elif phase == "generating":
            MegatronEngine.generate = paused(MegatronEngine.generate, 2)
        elif phase == "updating":
            step.update = paused(step.update, 2)
        elif phase == "saving":
            Saver.save = paused(Saver.save, 2)
        else:
            assert phase == "writing"  # in a thread, while training goes on
            Saver._write = paused(Saver._write, 2)

    def prepare_and_plant() -> None:
        prepare_imports()
        plant()

    runs.prepare_imports = prepare_and_plant  # torch is not imported before: signals are heard from the first second
    run_the_command_line()


if __name__ == "__main__":
    main()
