"""Whose random numbers are these? One counter-based generator, cut into streams that share no number.

Philox has a key of two words (the run's seed, and a step or an epoch) and a counter of four: the first counts, the
second is the purpose, the last two are a prompt's slot and a response. So the order of the prompts in epoch 3 has
nothing to do with what is sampled in step 3.

Left out: initial weights (torch's own generators). Imports no torch.
"""

from __future__ import annotations

import numpy as np

from megatron_powerflow.records import Purpose


def generator(purpose: Purpose, *, seed: int, index: int, slot: int = 0, response: int = 0) -> np.random.Generator:
    """seed, index, slot, response: whole numbers below 2^64."""
    return np.random.Generator(np.random.Philox(counter=[0, purpose, slot, response], key=[seed, index]))
