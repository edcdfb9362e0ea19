"""Which tensors of a loaded model hold numbers that are not finite?

A NaN in the base's weights spoils every log-prob without a word: the sampler draws noise and every step is skipped.
So the numbers are looked at where they have just been read, in the dtype in which the model holds them.

Left out: reading them (`live_weights.py`), log-probs that are not finite (`training/first_batch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.files import SafetensorsFolder
from megatron_powerflow.hf.live_weights import Chunk, placements
from megatron_powerflow.parallel.groups import Groups

MAX_REPORTED = 20


@torch.no_grad()
def require_finite(chunks: Sequence[Chunk], family: Family, groups: Groups, source: SafetensorsFolder | Path) -> None:
    """Raise UserError on every rank where a parameter on any of them holds NaN or infinity. Collective.

    source: what the parameters were filled from. Of a folder of safetensors the tensors are named one by one.
    """
    bad = not_finite(chunks, family, groups)
    if not bad:
        return
    folder, names = source, [" and ".join(of_one) for of_one in bad]
    if isinstance(source, SafetensorsFolder):
        folder = source.folder
        exact = [name for of_one in bad for name in of_one if not torch.isfinite(source.read(name)).all()]
        names = exact or names  # none: the numbers are finite there, and too large for the dtype of the model
    more = f" and {len(names) - MAX_REPORTED} more" if len(names) > MAX_REPORTED else ""
    raise UserError(
        f"{folder}: NaN or infinity in {', '.join(names[:MAX_REPORTED])}{more}; no log-prob of this model means "
        "anything: copy it again from where it was made, or take an earlier checkpoint of it"
    )


@torch.no_grad()
def not_finite(
    chunks: Sequence[Chunk], family: Family, groups: Groups, *, gradients: bool = False
) -> list[tuple[str, ...]]:
    """Return, for each parameter that holds a number that is not finite on any rank, the names of its Hugging Face
    tensors. Collective; the same on every rank.

    gradients: look at the parameters' gradients instead, as DDP holds them.
    """
    mine = []
    for placement in placements(chunks, family, groups.ep_rank):
        values = getattr(placement.parameter, "main_grad", None) if gradients else placement.parameter
        if values is not None and not torch.isfinite(values).all():
            mine.append(placement.hf_names)
    everyone: list[list[tuple[str, ...]]] = [[] for _ in range(groups.world_size)]
    dist.all_gather_object(everyone, mine, group=groups.control)
    return list(dict.fromkeys(names for of_rank in everyone for names in of_rank))
