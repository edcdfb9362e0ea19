"""In which steps do the lengths grow that attention sees? In steps of 128 on CUDA, token by token elsewhere.

cuDNN makes a plan for every new shape, some 0.1 s for a model of 24 layers on an H100. Responses grow by a token a pass
and micro-batches are as long as their longest rollout, so nearly every length would be new. What is added is padding
behind the real tokens: it is masked, or a causal mask hides it.

Left out: packed micro-batches. Transformer Engine plans for numbers of sequences and of tokens that are powers of two,
and takes the real lengths at run time; our own attention goes through them one by one.
"""

from __future__ import annotations

import torch

CUDA_LENGTH_STEP = 128


def length_step(device: torch.device) -> int:
    """Return the number of positions of which lengths are made a multiple on this device."""
    return CUDA_LENGTH_STEP if device.type == "cuda" else 1


def rounded_up(length: int, step: int) -> int:
    """Return the smallest multiple of `step` that is at least `length`."""
    return -(-length // step) * step
