"""Can the installed Megatron-Core read a checkpoint that another one wrote? An older one's always.

Megatron-Core 0.16 keeps what is no tensor in a file of its own, 0.19 among the tensors, and reads both. Left out: the
rest of the format, which is the same. Imports neither torch nor Megatron.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from megatron_powerflow.errors import UserError

COMMON_NAME = "common.pt"  # 0.16's file
BACKEND_NAME = "metadata.json"  # of any Megatron-Core's: how the shards are written
READS_BOTH = (0, 19)


def refuse_newer(policy: Path, installed: str | None = None) -> None:
    """Raise UserError where the folder of a checkpoint's policy was written by a Megatron-Core that is too new.

    installed: the version that is to read it; by default this environment's.
    """
    ours = installed or version("megatron-core")
    is_newer = (policy / BACKEND_NAME).exists() and not (policy / COMMON_NAME).exists()
    if is_newer and tuple(map(int, re.findall(r"\d+", ours)[:2])) < READS_BOTH:
        raise UserError(
            f"{policy}: has no {COMMON_NAME}: Megatron-Core 0.19 or newer wrote it, which the installed {ours} cannot "
            "read, or it is not complete; go on with Megatron-Core 0.19, which needs Python 3.12"
        )
