"""How are the ranks of a run started in a second, and what is left of them when they are gone?

This process imports torch and Megatron-Core once; each rank is a fork of it that calls the command line, as a launcher
would have it called. Each rank leads a session of its own, so that whatever it started is found by that session.

Left out: when a rank is killed, and what of its run is compared (`run.py`).
"""

from __future__ import annotations

import atexit
import faulthandler
import math
import mmap
import os
import signal
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

from tests.free_ports import free_port

PHASE_BYTES = 32


class Ranks:
    """The ranks of one start of a run: forked on construction, each with its output in `log`."""

    def __init__(self, arguments: Sequence[str], num_ranks: int, log: Path) -> None:
        self.started, self.started_at = time.monotonic(), time.time()
        self._log = log
        self.ended = math.inf  # when the last of them had ended
        self.exit_codes: dict[int, int] = {}  # rank -> as the shell counts it: minus the signal for a killed one
        self.pids: dict[int, int] = {}
        self._port = free_port()
        self._phases = mmap.mmap(-1, PHASE_BYTES * num_ranks)  # each rank writes what it does
        self._met = mmap.mmap(-1, num_ranks)  # and here a 1, when it has seen that all have come
        for rank in range(num_ranks):
            self.pids[rank] = _fork(arguments, rank, num_ranks, self._port, log, self._phases, self._met)

    def phase(self, rank: int) -> str:
        """Return what a rank was doing last: a phase of the run's pulse, or "importing"."""
        text = self._phases[PHASE_BYTES * rank : PHASE_BYTES * (rank + 1)].rstrip(b"\0").decode()
        return text or "importing"

    def alive(self) -> list[int]:
        """Return the ranks that have not ended."""
        for rank, pid in self.pids.items():
            if rank not in self.exit_codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.exit_codes[rank] = os.waitstatus_to_exitcode(status)
        left = [rank for rank in self.pids if rank not in self.exit_codes]
        if not left:
            self.ended = min(self.ended, time.monotonic())
        return left

    def wait(self, seconds: float) -> list[int]:
        """Wait until all ranks have ended, `seconds` at most. Returns those that have not."""
        until = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < until:
            time.sleep(0.02)
        return left

    def kill(self, rank: int) -> bool:
        """SIGKILL a rank. Returns False where it had ended before."""
        if rank not in self.alive():
            return False
        os.kill(self.pids[rank], signal.SIGKILL)
        return True

    def have_met(self, but: int) -> bool:
        """Tell whether every rank knows every other. but: the one that is about to go."""
        return all(self._met[rank] for rank in self.pids if rank != but)

    def end_as_a_launcher(self) -> int:
        """Kill what is left two seconds after a rank has gone, as torchrun and `srun --kill-on-bad-exit` do. Returns
        how many that were."""
        left = self.wait(2)
        for rank in left:
            self.kill(rank)
        self.wait(10)
        return len(left)

    def stacks(self) -> str:
        """Return where each rank that is left stands: the Python stacks of its threads."""
        before = self._log.stat().st_size
        for rank in self.alive():
            os.kill(self.pids[rank], signal.SIGUSR2)
        time.sleep(1)
        return self._log.read_bytes()[before:].decode(errors="replace")

    def orphans(self) -> dict[int, str]:
        """Return the processes that are alive in a session of a rank that has ended: pid -> what it runs."""
        ended = {self.pids[rank] for rank in self.exit_codes}
        return {
            pid: command
            for pid, (session, command) in _processes().items()
            if session in ended and pid not in self.pids.values()
        }

    def end(self) -> None:
        """Kill what is left of them, and what they have started."""
        for rank in self.alive():
            self.kill(rank)
        self.wait(10)
        for pid in self.orphans():
            os.kill(pid, signal.SIGKILL)


def warm_up() -> None:
    """Import, in this process, what each rank would import. No thread may start by that: forks have none."""
    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    import megatron.core.dist_checkpointing
    import megatron.core.models.gpt
    import megatron.core.optimizer
    import transformers

    import megatron_powerflow.cli
    import megatron_powerflow.train

    assert all((megatron, transformers, megatron_powerflow))


def _fork(
    arguments: Sequence[str], rank: int, num_ranks: int, port: int, log: Path, phases: mmap.mmap, met: mmap.mmap
) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__)
    atexit._clear()  # what this process owes at its end, its scratch folder among it, is not the fork's to do
    weakref.finalize._registry.clear()
    code = 1
    try:
        if num_ranks > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num_ranks),
                LOCAL_WORLD_SIZE=str(num_ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = ["powerflow", *arguments]
        _show_phase(phases, PHASE_BYTES * rank)
        _show_met(met, rank)
        from megatron_powerflow.cli import main  # warm_up has imported it

        main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()  # what the run owes: processes that libraries started end so
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _show_phase(memory: mmap.mmap, offset: int) -> None:
    """Have this process write each phase of its run into the memory that it shares with the one that kills it."""
    from megatron_powerflow.parallel.pulse import Pulse

    def show(pulse: Pulse, phase: str) -> None:
        pulse.__dict__["shown"] = phase
        memory[offset : offset + PHASE_BYTES] = phase.encode().ljust(PHASE_BYTES, b"\0")

    Pulse.phase = property(lambda pulse: pulse.__dict__["shown"], show)  # type: ignore[assignment]


def _show_met(memory: mmap.mmap, rank: int) -> None:
    """Have this process note when it has seen that all ranks have come."""
    from megatron_powerflow.parallel import meeting

    wait_for_all = meeting._wait_for_all

    def noted(*arguments) -> None:
        wait_for_all(*arguments)
        memory[rank] = 1

    meeting._wait_for_all = noted


def _processes() -> dict[int, tuple[int, str]]:
    """Return pid -> (session, command line) of every process of this machine that is not a zombie."""
    processes = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if fields[0] != "Z":
            processes[int(entry.name)] = int(fields[3]), command
    return processes
