"""Does a response hold its answer in a box, and what does it cost when it does not?

psi enters the energy per token: a response without \\boxed{} has alpha * psi added to each of its n tokens'
share, so psi = -0.5 at alpha = 4 is -2 nats a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_powerflow.records import Rollout


def last_boxed(text: str) -> str | None:
    """What stands in the last complete \\boxed{...}, braces balanced; None when there is none, or it is empty."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        begin = start + len("\\boxed{")
        depth = 1
        for end in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[begin:end].strip() or None
        start = text.rfind("\\boxed{", 0, start)
    return None


def format_penalty(rollout: Rollout, boxed: bool, *, psi: float, exempt_tasks: Sequence[str]) -> float:
    """psi without a box, 0 with one; tasks that ask for no box are exempt."""
    return 0.0 if boxed or rollout.prompt.task in exempt_tasks else psi
