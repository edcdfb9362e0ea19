"""How is a run asked to stop? By a signal to any rank, or by a file in its folder; all ranks stop at one step."""

from __future__ import annotations

import signal
from pathlib import Path

from megatron_powerflow.checkpoint.folder import STOP_NAME
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.owner import Owner
from megatron_powerflow.parallel.together import any_rank, on_main


class StopSignal:
    """Asked at the end of each step: SIGTERM, SIGUSR1 (SLURM's warning) or a file RUN/stop, on any rank.

    All ranks agree, so all of them save the same step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self, folder: Path, owner: Owner, groups: Groups) -> None:
        self._file, self._owner, self._groups = folder / STOP_NAME, owner, groups
        self.by = ""  # what asked, as far as this rank knows
        self._received = ""  # the signal's name

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> bool:
        """Collective; the same answer everywhere. Raises UserError when the folder has another owner by now."""
        on_main(self._owner.confirm, self._groups)
        by_file = self._groups.is_main and self._file.exists()
        self.by = self._received or (STOP_NAME if by_file else "another rank")
        return any_rank(bool(self._received) or by_file, self._groups)

    def _note(self, number: int, frame) -> None:
        self._received = signal.Signals(number).name
