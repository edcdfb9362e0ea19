"""How does the program end: with which exit code, and which words on stderr, on one rank or on many?"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from megatron_powerflow.errors import (
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    Interrupted,
    RequeueRequested,
    UserError,
)
from megatron_powerflow.parallel.initialize import environment_secrets, read_launch
from megatron_powerflow.redaction import redacted


def exit_codes(program: Callable[[], None]) -> None:
    """Run a command line. Exit codes: 0, 2 the user's mistake, 75 start me again, else a bug with its traceback."""
    try:
        program()
    except UserError as error:
        _leave(EXIT_USER_ERROR, [f"error: {violation}" for violation in error.violations])
    except RequeueRequested as request:
        _leave(EXIT_REQUEUE, [str(request)])
    except Interrupted as request:
        _leave(EXIT_INTERRUPTED, [str(request)])
    except KeyboardInterrupt:
        _leave(EXIT_INTERRUPTED, ["interrupted"])
    except Exception:
        if read_launch().world_size == 1:
            raise
        from megatron_powerflow.run_end import leave

        traceback.print_exc()
        leave(1)


def _leave(code: int, lines: list[str]) -> None:
    """Exit on every rank alike; one of them says why."""
    launch = read_launch()
    if launch.is_main:
        secrets = environment_secrets()
        print(*(redacted(line, secrets) for line in lines), sep="\n", file=sys.stderr)
    if launch.world_size > 1:
        from megatron_powerflow.run_end import leave

        leave(code)
    sys.exit(code)
