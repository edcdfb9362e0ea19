"""Who learns log Z'(q)? A small fp32 module beside the policy, on the last pipeline stage.

It is no part of the policy module: weight sync, export and the policy's optimizer cannot see it. It reads the
mean of the final hidden states over the prompt (every prompt token, by mask), detached unless told otherwise, and
starts at the calibrated constant: last weight zero, bias (alpha - 1) * mean token log-prob of the first batch.

Left out: the group estimators, which learn nothing (`objective/log_z_estimate.py`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class LogZHead(nn.Module):
    """forward(prompt_pool [B, H]) -> log_z [B] fp32, natural logarithm per token.

    kind "mlp": (Linear, GELU, LayerNorm) twice, then Linear to 1, after FlowRL's head without its dropout, which
    would make log Z' noisy for a fixed prompt. kind "scalar": one number for all prompts.
    """

    def __init__(self, hidden_size: int, *, kind: Literal["mlp", "scalar"], detach: bool, seed: int) -> None:
        super().__init__()
        self.detach = detach
        self.kind = kind
        if kind == "scalar":
            self.value = nn.Parameter(torch.zeros(()))
            return
        generator = torch.Generator().manual_seed(seed)  # equal on every rank, whatever else was drawn
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [_linear(hidden_size, hidden_size, generator), nn.GELU(), nn.LayerNorm(hidden_size)]
        self.body = nn.Sequential(*layers)
        self.last = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @torch.no_grad()
    def calibrate(self, log_z: float) -> None:
        """Make this the answer for every prompt. Call once, before the first update."""
        (self.value if self.kind == "scalar" else self.last.bias).fill_(log_z)

    def forward(self, prompt_pool: Tensor) -> Tensor:
        if self.kind == "scalar":
            return self.value.expand(prompt_pool.shape[0])
        pool = prompt_pool.float()
        return self.last(self.body(pool.detach() if self.detach else pool)).squeeze(-1)


def pool_prompt(hidden: Tensor, prompt_mask: Tensor) -> Tensor:
    """Mean of hidden [s, b, H] over the prompt positions of prompt_mask [b, s] -> [b, H] fp32."""
    mask = prompt_mask.t().unsqueeze(-1).float()
    return (hidden.float() * mask).sum(dim=0) / mask.sum(dim=0)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear's own initialisation, from a generator of ours."""
    layer = nn.Linear(inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
