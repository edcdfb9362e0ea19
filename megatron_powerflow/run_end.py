"""How does a run's process end, and who is told? The screen once, the other ranks, and whoever started the run.

A rank that fails claims the failure (`parallel/watch.py`), and only the first claim is printed; the others leave with
its exit code. A main thread that waits in a collective cannot leave by itself: after a grace, the watch's thread ends
the process for it. How it ended stands in RUN/outcome.json, since torchrun turns every exit code into 1.

Left out: asking a run to stop at the end of a step (`training/stop_signal.py`); before there is a folder, errors are
printed by the main rank (`cli/leaving.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_powerflow.checkpoint.first_files import remove_first_files, remove_heartbeats
from megatron_powerflow.checkpoint.folder import LOCK_NAME, latest_checkpoint
from megatron_powerflow.children import end_children, end_forked_with_parent, leave
from megatron_powerflow.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    Interrupted,
    RequeueRequested,
    UserError,
)
from megatron_powerflow.outcome import outcome_of, remove_outcome, running, write_outcome
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.owner import Owner, held_by_another
from megatron_powerflow.parallel.pulse import Pulse
from megatron_powerflow.parallel.watch import HEARTBEATS_NAME, Failure, Watch
from megatron_powerflow.signals import Signals

if TYPE_CHECKING:
    from megatron_powerflow.parallel.groups import Groups

GRACE_SECONDS = 3.0  # for a main thread to leave by itself, once another rank has failed
MAIN_FIRST_SECONDS = 1.0  # what every rank finds wrong is the main one's to say
CAUSE_SECONDS = 3.0  # to find whose end broke a collective


class RunEnd:
    """The end of a run on this rank. A context, from the first second of `powerflow train`.

    pulse: what this rank does, for the others. signals: what it was sent.
    """

    def __init__(self, launch: Launch) -> None:
        self.pulse = Pulse()
        self.signals = Signals(self._leave_for, self._say_noted)
        self.launch = launch
        self._folder: Path | None = None
        self._owner: Owner | None = None
        self._watch: Watch | None = None
        self._failure: Failure | None = None  # for which this process ends
        self._entered, self._settling, self._said = False, False, False
        self._leaving, self._saying = threading.Lock(), threading.Lock()
        self.began = time.time()

    def __enter__(self) -> RunEnd:
        self._entered = True
        end_forked_with_parent()
        self.signals.__enter__()
        return self

    def __exit__(self, kind, error, _) -> None:
        self.signals.__exit__()
        if self._failure is not None and self.launch.world_size > 1:
            if self._failure.rank == self.launch.rank:
                self._print(self._failure)
            leave(self._failure.exit_code)

    def of_run(self, folder: Path) -> None:
        """Name the run's folder. An outcome of an older start there goes, unless another process holds the folder."""
        self._folder = folder
        if self.launch.is_main and held_by_another(folder, folder / LOCK_NAME) is None:
            with contextlib.suppress(OSError):  # what cannot be written is refused by the start
                remove_outcome(folder)

    def _begin(self, folder: Path, take: Callable[[], None]) -> str:
        """Take the run's folder, say in it that the run goes on, and make the folder of this start's heartbeats.

        Returns its name. For the main rank. Raises OSError, UserError.
        """
        take()
        if not self._entered:
            return ""
        remove_heartbeats(folder)
        name = uuid.uuid4().hex
        if self.launch.world_size > 1:
            (folder / HEARTBEATS_NAME / name).mkdir(parents=True)
        write_outcome(folder, running())
        return name

    @contextlib.contextmanager
    def watched(
        self, folder: Path, owner: Owner, groups: Groups, take: Callable[[], None], hang_seconds: float
    ) -> Iterator[None]:
        """Keep an eye on the other ranks during the block, and tell them and the folder how it ends. Collective.

        take: makes the main rank the folder's owner, before anything is written in it. hang_seconds: for which a rank
        may be silent, or not get on. Raises UserError on every rank where the folder is not to be had.
        """
        from megatron_powerflow.parallel.together import on_main

        name = on_main(lambda: self._begin(folder, take), groups)
        if not self._entered:
            yield
            return
        self._folder, self._owner = folder, owner
        with contextlib.ExitStack() as stack:
            if self.launch.world_size > 1:
                watch = Watch(
                    folder / HEARTBEATS_NAME / name,
                    self.launch.rank,
                    self.launch.world_size,
                    self.pulse,
                    hang_seconds=hang_seconds,
                    failed=self._end_with,
                )
                self._watch = stack.enter_context(watch)
            try:
                yield
            except BaseException as error:
                self._failure = self._settle(error)
                raise
        if self.launch.is_main:
            self._write_outcome(Failure(0, 0, self.pulse.step, ""))

    def loaded(self, chunks: Sequence[Any]) -> None:
        """Note that the steps begin. chunks: of the model; each of their passes shows that this rank gets on."""
        self.pulse.follow(*chunks)
        self.pulse.begin_steps()
        self.signals.begin_steps()

    def _settle(self, error: BaseException) -> Failure:
        """Find for what the run ends, after this rank has raised `error`, and write it into the folder."""
        self._settling = True
        rank, step = self.launch.rank, self.pulse.step
        mine = Failure(rank, EXIT_FAILED, step, self._say(error))
        if isinstance(error, RequeueRequested | Interrupted):  # on every rank alike
            code = EXIT_REQUEUE if isinstance(error, RequeueRequested) else EXIT_INTERRUPTED
            mine = Failure(0, code, None if step is None else step + 1, str(error))
        elif self._watch is None:
            mine = Failure(rank, _exit_code(error), step, self._short(error))
        else:
            wait = 0.0 if self.launch.is_main else MAIN_FIRST_SECONDS
            wait = CAUSE_SECONDS if isinstance(error, RuntimeError) else wait if isinstance(error, UserError) else 0.0
            mine = Failure(rank, _exit_code(error), step, self._say(error))
            mine = self._watch.wait_for_another(wait) or self._watch.claim(mine)
        if mine.rank == rank:
            self._write_outcome(mine)
        return mine

    def _say(self, error: BaseException) -> str:
        """What the screen shows of an error of one rank among several."""
        who = f"rank {self.launch.rank} on {socket.gethostname()}, in {self.pulse.describe()}"
        if isinstance(error, UserError):
            lines = [f"error: {violation}" for violation in error.violations]
            return "\n".join(lines if self.launch.is_main else [*lines, f"({who})"])
        return f"{who}: failed\n" + "".join(traceback.format_exception(error)).rstrip()

    def _short(self, error: BaseException) -> str:
        return "\n".join(error.violations) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"

    def _write_outcome(self, failure: Failure) -> None:
        message = failure.text.splitlines()
        text = "" if not message else message[0] if failure.exit_code != EXIT_FAILED else f"{message[0]}; {message[-1]}"
        if len(message) == 1:
            text = message[0]
        with contextlib.suppress(OSError):  # then "running" stays, which is taken for a failure
            if self._folder is not None and self._folder.is_dir():
                write_outcome(self._folder, outcome_of(failure.exit_code, failure.step, text.removeprefix("error: ")))

    def _leave_for(self, number: signal.Signals) -> None:
        """In the signals' thread: end this process now."""
        with contextlib.suppress(OSError):  # the others' end may have come first, and be the reason for the signal
            if self._watch is not None and (found := self._watch.wait_for_another(0.0)):
                self._end_with(found)
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE
        last = None
        with contextlib.suppress(UserError, OSError):
            last = latest_checkpoint(self._folder) if self._folder is not None else None
        why = f"{number.name} again: left without saving" if self.signals.in_steps else f"{number.name} while loading"
        why = "interrupted" if number == signal.SIGINT else why
        text = f"{why}; the same command continues from {last or 'the start'}"
        failure = Failure(self.launch.rank, code, self.pulse.step, text)
        if self._watch is not None:
            if not self.launch.is_main:
                time.sleep(MAIN_FIRST_SECONDS)
            failure = self._watch.claim(failure)
        says = failure.rank == self.launch.rank and (self._watch is not None or self.launch.is_main)
        self._leave_now(failure, says=says)

    def _say_noted(self, number: signal.Signals) -> None:
        if self.launch.is_main:
            text = f"{number.name}: the run saves at the end of this step and stops; once more, and it leaves at once\n"
            os.write(1, text.encode())

    def _end_with(self, failure: Failure) -> None:
        """In the watch's thread: another rank has failed, or does not get on."""
        says = failure.rank == self.launch.rank
        if self._settling or not says:
            time.sleep(GRACE_SECONDS)
        self._leave_now(failure, says=says)

    def _print(self, failure: Failure) -> None:
        """To stderr, once: two threads may be about to. Not by Python's file, which the main thread may hold."""
        with self._saying:
            said, self._said = self._said, True
        if not said:
            os.write(2, f"{failure.text}\n".encode(errors="replace"))

    def _leave_now(self, failure: Failure, *, says: bool) -> NoReturn:
        """End the process from another thread than the main one: what a clean way out would do, as far as it counts."""
        self._leaving.acquire()  # by one thread, once
        if says:
            self._print(failure)
            if self._owner is not None:
                self._write_outcome(failure)
        with contextlib.suppress(Exception):  # whatever happens here, the process ends
            if self._owner is not None and self._owner.holds():
                if failure.exit_code == EXIT_USER_ERROR and self._folder is not None:
                    remove_first_files(self._folder)
                self._owner.release()
        end_children()
        os._exit(failure.exit_code)  # unflushed: the main thread may hold its files


def _exit_code(error: BaseException) -> int:
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
