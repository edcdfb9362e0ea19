"""How does a process become one that rehearses? Once and for good: it cannot compute afterwards.

Call before anything imports Megatron-Core.
"""

from __future__ import annotations

import logging
import warnings

from megatron_powerflow.parallel.launch import hide_gpus


def prepare() -> None:
    """Hide the GPUs of this machine, put Megatron-Core's tensors on `meta`, and keep its notices off the screen."""
    hide_gpus()
    import torch

    from megatron_powerflow.parallel import cpu_gloo

    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")
    for library in ("megatron", "torch"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if torch.cuda.is_available():
        raise RuntimeError("a rehearsal was begun in a process that has used a GPU")
    cpu_gloo.install(device="meta")

    from megatron_powerflow.rehearsal.fake_world import implement_coalesced

    implement_coalesced()
