"""Who learns log Z'(q)? A small fp32 module beside the policy, on the last pipeline stage.

It is no part of the policy module: weight sync, export and the policy's optimizer cannot see it. It reads the mean of
the final hidden states over the prompt (every prompt token, by mask), detached unless told otherwise, and starts at the
calibrated constant: last weight zero, bias (alpha - 1) * mean token log-prob of the first batch.

How it moves: an update takes a share `rate` of the residuals out of log Z' (normalised least mean squares). With
features h(q) of mean square <= 1 and K(q, q') = 1 + h(q) . h(q') / NUM_FEATURES,

    log Z'(q) changes by  -rate * sum_b w_b K(q, q_b) delta_b / sum_b w_b

which knows no width, unit or length, whatever the normalisation of the objective. A batch whose residuals cancel moves
nothing, and what noise moves is a share of its own standard error. Adam, which FlowRL's head has, makes full steps of
noise however small: lr * sum|h| ~ 0.8 H lr for the last layer, 1.2 nats at H = 1536. Its rates divided by the width
are as accurate after 200 steps but ask for a step in nats, which depends on the objective (`benchmarks/README.md`).

The hidden layers stay as they were drawn. Prompt states of one model are nearly parallel (cosine .97), so what tells
prompts apart would be learned slowly; it is made visible by taking away the mean of the first batch.

Left out: the group estimators, which learn nothing (`objective/log_z_estimate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

NUM_FEATURES = 512  # at any width of the model
# mean square of what is left of a normalised state without the first batch's mean, under which it is not made larger:
# rounding must not become a feature where there is one prompt
SMALLEST = 1e-3


class LogZHead(nn.Module):
    """forward(prompt_pool [B, H]) -> log_z [B] fp32, natural logarithm per token.

    kind "mlp": two hidden layers (Linear, GELU), drawn from `seed` and kept, and a learned Linear to 1. kind "scalar":
    one number for all prompts. rate: share of the mean residual that `step` takes out, 0 <= rate < 1.
    """

    state_centre: Tensor
    feature_centre: Tensor

    def __init__(self, hidden_size: int, *, kind: Literal["mlp", "scalar"], detach: bool, seed: int) -> None:
        super().__init__()
        self.detach = detach
        self.kind = kind
        self.rate = 0.0
        self.bias = nn.Parameter(torch.zeros(()))
        if kind == "scalar":
            return
        generator = torch.Generator().manual_seed(seed)  # equal on every rank, whatever else was drawn
        sizes = (hidden_size, NUM_FEATURES, NUM_FEATURES)
        self.body = nn.Sequential(
            *(part for i in (0, 1) for part in (_linear(sizes[i], sizes[i + 1], generator), nn.GELU()))
        ).requires_grad_(False)
        self.weight = nn.Parameter(torch.zeros(NUM_FEATURES))
        self.register_buffer("state_centre", torch.zeros(hidden_size))
        self.register_buffer("feature_centre", torch.zeros(NUM_FEATURES))

    def learned(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def calibrate(self, log_z: float) -> None:
        """Make this the answer for every prompt. Call once, before the first update."""
        self.bias.fill_(log_z)

    @torch.no_grad()
    def centre(self, prompt_pool: Tensor, mean: Callable[[Tensor], Tensor]) -> None:
        """Take the mean of the first batch for what all prompts share. Call once, before the first update.

        prompt_pool: [B, H], of this rank. mean: [B, k] -> [k] over the rollouts of all ranks; a collective.
        """
        self.state_centre.copy_(mean(_normalised(prompt_pool)))
        self.feature_centre.copy_(mean(self._hidden(prompt_pool)))

    def features(self, prompt_pool: Tensor) -> Tensor:
        """[B, H] any float -> [B, NUM_FEATURES] fp32, mean square at most 1."""
        return _deviation(self._hidden(prompt_pool), self.feature_centre)

    def forward(self, prompt_pool: Tensor) -> Tensor:
        if self.kind == "scalar":
            return self.bias.expand(prompt_pool.shape[0])
        pool = prompt_pool.detach() if self.detach else prompt_pool
        return self.features(pool) @ self.weight + self.bias

    @torch.no_grad()
    def step(self, mean_weight: float) -> None:
        """Take the share `rate` of the residuals out of log Z', given the gradients of the whole update's loss.

        mean_weight: of the loss's weight over the update's kept rollouts, global. The gradient of the loss by log Z'(q)
        is 2 mean_weight times the weighted mean residual.
        """
        if mean_weight <= 0:
            return
        share = self.rate / (2.0 * mean_weight)
        assert self.bias.grad is not None
        self.bias.sub_(share * self.bias.grad)
        if self.kind == "mlp":
            assert self.weight.grad is not None
            self.weight.sub_(share / NUM_FEATURES * self.weight.grad)

    def _hidden(self, prompt_pool: Tensor) -> Tensor:
        return _normalised(self.body(_deviation(_normalised(prompt_pool), self.state_centre)))


def pool_prompt(hidden: Tensor, prompt_mask: Tensor) -> Tensor:
    """Mean of hidden [s, b, H] over the prompt positions of prompt_mask [b, s] -> [b, H] fp32."""
    mask = prompt_mask.t().unsqueeze(-1).float()
    return (hidden.float() * mask).sum(dim=0) / mask.sum(dim=0)


def _normalised(values: Tensor) -> Tensor:
    return layer_norm(values.float(), values.shape[-1:])


def _deviation(values: Tensor, centre: Tensor) -> Tensor:
    """values - centre, of mean square 1, or less where it is smaller than SMALLEST."""
    left = values - centre
    return left * left.square().mean(dim=-1, keepdim=True).clamp(min=SMALLEST).rsqrt()


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """nn.Linear's own initialisation, from a generator of ours."""
    layer = nn.Linear(inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
