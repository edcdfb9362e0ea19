"""How does the program end: with which exit code, and which words on stderr, on one rank or on many?"""

from __future__ import annotations

import atexit
import contextlib
import errno
import sys
import traceback
from collections.abc import Callable

from megatron_powerflow.children import leave
from megatron_powerflow.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    Interrupted,
    RankError,
    RequeueRequested,
    UserError,
)
from megatron_powerflow.parallel.launch import ALONE, Launch, environment_secrets, read_launch
from megatron_powerflow.redaction import redacted


def run_and_leave(program: Callable[[], None]) -> None:
    """`exit_codes`, for a process that does nothing else: behind its last duty it leaves, and nothing is taken down."""
    code = EXIT_FAILED
    atexit.register(lambda: leave(code))  # the first that is registered is the last that is called
    try:
        exit_codes(program)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def exit_codes(program: Callable[[], None]) -> None:
    """Run a command line. Exit codes: 0, 2 the user's mistake, 75 start me again, else a bug with its traceback."""
    try:
        _run(program)
    except UserError as error:
        own = isinstance(error, RankError)
        _leave(EXIT_USER_ERROR, [f"error: {violation}" for violation in error.violations], own=own)
    except RequeueRequested as request:
        _leave(EXIT_REQUEUE, [str(request)])
    except Interrupted as request:
        _leave(EXIT_INTERRUPTED, [str(request)])
    except KeyboardInterrupt:
        _leave(EXIT_INTERRUPTED, ["interrupted"])
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            _leave(EXIT_USER_ERROR, ["error: the output cannot be written: no space left where it goes"])
        if _launch().world_size == 1:
            raise
        traceback.print_exc()
        leave(1)


def _run(program: Callable[[], None]) -> None:
    """Run it, and write out what Python still holds of its output: that this cannot be written is to be said."""
    end = None
    try:
        program()
    except SystemExit as error:  # typer's, behind every command
        end = error
    with contextlib.suppress(BrokenPipeError):  # whoever read it has had enough, as of `| head`
        sys.stdout.flush()
    if end is not None:
        raise end


def _leave(code: int, lines: list[str], *, own: bool = False) -> None:
    """Exit on every rank alike; one of them says why, and each whose reason is its own."""
    launch = _launch()
    if launch.is_main or own:
        secrets = environment_secrets()
        print(*(redacted(line, secrets) for line in lines), sep="\n", file=sys.stderr)
    if launch.world_size > 1:
        leave(code)
    sys.exit(code)


def _launch() -> Launch:
    """This process's; where the environment contradicts itself nobody speaks for another, and each says so."""
    try:
        return read_launch()
    except UserError:
        return ALONE
