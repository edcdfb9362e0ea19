"""What ends a run on purpose, and with which exit code?

Left out: bugs. Anything that is not listed here is one, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_FAILED = 1  # a bug, or a rank that is gone
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # Ctrl-C, as shells have it
EXIT_REQUEUE = 75  # EX_TEMPFAIL: the same command, started again, continues


class UserError(ValueError):
    """An input is wrong and the user can mend it: exit code 2.

    violations: everything that is wrong, one sentence each: what was got, what holds, what to do.
    """

    def __init__(self, violations: str | Sequence[str]) -> None:
        self.violations = (violations,) if isinstance(violations, str) else tuple(violations)
        assert self.violations, "a UserError needs at least one violation"
        super().__init__("\n".join(self.violations))


class RankError(UserError):
    """A UserError that may be one rank's alone, of which the main rank does not know: each rank that has it says it."""


def disk_refusal(error: OSError) -> UserError:
    """Make the user's error of what a disk refused: the path, what happened, what to do."""
    where = error.filename or "a file of this command"
    why = error.strerror or str(error) or type(error).__name__
    return UserError(
        f"{where}: could not be read or written ({why}); free space on that disk or mend its permissions, and the same "
        "command continues"
    )


class RequeueRequested(Exception):
    """A signal or a stop file asked the run to end; its state is saved: exit code 75. by: what asked, for people."""

    def __init__(self, message: str, *, by: str = "") -> None:
        super().__init__(message)
        self.by = by


class Interrupted(Exception):
    """Ctrl-C asked the run to end; its state is saved: exit code 130."""
