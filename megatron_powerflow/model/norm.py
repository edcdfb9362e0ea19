"""RMS norm for the local layer spec, where Transformer Engine is absent.

Megatron's own `WrappedTorchNorm` refuses sequence parallelism; this one marks its weight, so that Megatron
sums its gradient over tensor-parallel ranks, which each saw a part of the sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight; the mean in fp32, the result in x's dtype.

    Built by Megatron's specs with (config, hidden_size, eps).
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float()
        scaled = scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight
