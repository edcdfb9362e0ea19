"""How do the processes that this one started end with it, however it ends? They look whether it is still there.

Megatron's writers are forked and its queue is served by a spawned process: neither asks after its parent, so a SIGKILL
left them behind, with the sockets of the process group. Left out: programs started by `subprocess`, which are others'
(wandb's service looks after its own parent).
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from typing import NoReturn

LOOK_SECONDS = 1.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int) -> None:
    """End this process soon after its parent, which has this number: from now on, in a thread."""
    threading.Thread(target=_outlive, args=(parent,), name="end with parent", daemon=True).start()


def end_spawned_with_parent() -> None:
    """`end_with_parent` in a process that multiprocessing has spawned; nothing in any other. For the entry module,
    which a spawned process imports before its work."""
    if multiprocessing.current_process().name != "MainProcess":  # parent_process() is not known yet
        end_with_parent(os.getppid())


def end_forked_with_parent() -> None:
    """Have every process that is forked from now on end with this one."""
    forking = os.getpid()

    def note() -> None:
        nonlocal forking
        forking = os.getpid()

    os.register_at_fork(before=note, after_in_child=lambda: end_with_parent(forking))


def die_with_parent() -> None:
    """Have this process sent SIGTERM when the thread that started it ends. For `preexec_fn`, between fork and exec:
    the kernel's own way, for a program that knows nothing of its parent. Nothing where the kernel has none."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_children() -> None:
    """Kill what multiprocessing has started from here: for a process that is about to leave without a word."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, ValueError, AssertionError):
            child.kill()


def leave(code: int) -> NoReturn:
    """End this process now, with what it started. Nothing is taken down: not process groups, which could wait for ranks
    that are gone, and not torch and Megatron, whose end takes a core most of a second."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    end_children()
    os._exit(code)


def _outlive(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)
