"""Which signals has this process received, and when does one end it at once? Heard from the first second on.

Python runs a handler between two of its own instructions, so not while the main thread waits in a collective. Here the
interpreter's C handler writes the signal's number into a pipe, and a thread reads it: a second signal is heard however
deep the main thread sleeps.

    loading              one signal: this process leaves at once, there is nothing to save
    steps                the first: finish the step and save (`training/stop_signal.py`); the same again: leave at once

Left out: what leaving means (`run_end.py`).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

KINDS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Two of a kind within these are one: a terminal gives Ctrl-C to every process, and torchrun passes it on once more.
ONE_SECONDS = 1.0


class Signals:
    """SIGTERM, SIGUSR1 and SIGINT of this process. A context, for the main thread.

    leave: called in another thread, with the signal, when this process is to end at once; noted: with the first one
    that the steps will honour.
    """

    def __init__(self, leave: Callable[[signal.Signals], object], noted: Callable[[signal.Signals], object]) -> None:
        self._leave, self._noted = leave, noted
        self._times: dict[signal.Signals, float] = {}  # of those that came during steps
        self.in_steps = False

    def __enter__(self) -> Signals:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        os.register_at_fork(before=self._hold, after_in_parent=self._let_go, after_in_child=self._forget)
        self._open = True
        # what nohup or a shell's `&` had ignored stays ignored
        heard = [number for number in KINDS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, lambda *_: None) for number in heard}
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._reader,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._open = False
        signal.set_wakeup_fd(self._fd_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)

    @property
    def asked(self) -> signal.Signals | None:
        """The first signal that came during steps."""
        return next(iter(self._times), None)

    def begin_steps(self) -> None:
        """From now on a first signal is for the end of the step."""
        self.in_steps = True

    def hear(self, number: signal.Signals, now: float) -> None:
        """Take one signal in. now: seconds of a clock that only goes forward."""
        if not self.in_steps:
            self._leave(number)
        elif number not in self._times:
            self._times[number] = now
            self._noted(number)
        elif now - self._times[number] > ONE_SECONDS:
            self._leave(number)

    def _listen(self, reader: int) -> None:
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while numbers := pipe.read(64):
                for number in numbers:
                    if number in KINDS:
                        self.hear(signal.Signals(number), time.monotonic())

    def _hold(self) -> None:
        """Before a fork: a signal to the child waits until it is the child's own."""
        if self._open:
            signal.pthread_sigmask(signal.SIG_BLOCK, KINDS)

    def _let_go(self) -> None:
        if self._open:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, KINDS)

    def _forget(self) -> None:
        """In a forked child: its signals are its own, and the pipe is its parent's."""
        if self._open:
            signal.set_wakeup_fd(-1)
            for number in self._before:
                signal.signal(number, signal.SIG_DFL)
            self._let_go()
