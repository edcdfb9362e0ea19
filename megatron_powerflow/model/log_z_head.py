"""Who learns log Z'(q)? A small fp32 module beside the policy, on the last pipeline stage.

It is no part of the policy module: weight sync, export and the policy's optimizer cannot see it. It reads the mean of
the final hidden states over the prompt's tokens, detached unless its `detach` is off.

It starts at a calibrated constant. Before the first update `training/update.py` computes, over the rollouts of the
whole first step, minus the weighted mean of the residual without log Z', in the normalisation of the objective
(`initial_log_z` of `objective/trajectory_balance.py`), and `calibrate` makes that the bias; the last weight is zero, so
it is the answer for every prompt. A head of kind "mlp" also takes the mean of that step's prompts as its centre.

How it moves: an update takes a share `rate` of the residuals out of log Z' (normalised least mean squares). With
features h(q) of mean square <= 1 and K(q, q') = 1 + h(q) . h(q') / NUM_FEATURES,

    log Z'(q) changes by  -rate * sum_b w_b K(q, q_b) delta_b / sum_b w_b

This depends on no width, unit or length, whatever the normalisation of the objective. A batch whose residuals cancel
moves nothing, and what noise moves is a share of its own standard error. Adam, which FlowRL's head has, makes full
steps of noise however small: lr * sum|h| ~ 0.8 H lr for the last layer, 1.2 nats at H = 1536. Adam's rates divided by
the width are as accurate after 200 steps, but then the step is one in nats and has to be chosen for each objective
(`benchmarks/README.md`).

The hidden layers stay as they were drawn. Prompt states of one model are nearly parallel (cosine .97), so what tells
prompts apart would be learned slowly; subtracting the mean of the first step's prompts makes it visible.

Left out: the group estimators, which learn nothing (`objective/log_z_estimate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

NUM_FEATURES = 512  # at any width of the model
# Deviations from the centre are scaled to mean square 1, unless their mean square is below this: where there is only
# one prompt, rounding must not become a feature.
SMALLEST = 1e-3


class LogZHead(nn.Module):
    """The learned log Z'. forward: prompt_pool [B, H], any float -> log_z [B] fp32, a natural logarithm, per token or
    per response as the objective's residual is.

    kind "mlp": two hidden layers (Linear, GELU), drawn from `seed` and kept, and a learned Linear to 1. kind "scalar":
    one number for all prompts. detach: whether no gradient reaches the prompt's states. rate: the share of the mean
    residual that `step` takes out, 0 <= rate < 1.
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
        """Yield the parameters that `step` moves: the bias, and the last weight of an "mlp"."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    @torch.no_grad()
    def calibrate(self, log_z: float) -> None:
        """Make `log_z` the answer for every prompt, as long as the last weight is zero. Call it before the first
        update."""
        self.bias.fill_(log_z)

    @torch.no_grad()
    def centre(self, prompt_pool: Tensor, mean: Callable[[Tensor], Tensor]) -> None:
        """Take the mean over these prompts for what all prompts share, and subtract it from now on. Only for kind
        "mlp"; call it before the first update.

        prompt_pool: [B, H], of this rank. mean: [B, k] -> [k] over the rollouts of all ranks; a collective.
        """
        self.state_centre.copy_(mean(_normalised(prompt_pool)))
        self.feature_centre.copy_(mean(self._hidden(prompt_pool)))

    def features(self, prompt_pool: Tensor) -> Tensor:
        """Return the features h(q) of prompts: [B, H] any float -> [B, NUM_FEATURES] fp32, of mean square at most 1."""
        return _deviation(self._hidden(prompt_pool), self.feature_centre)

    def forward(self, prompt_pool: Tensor) -> Tensor:
        if self.kind == "scalar":
            return self.bias.expand(prompt_pool.shape[0])
        pool = prompt_pool.detach() if self.detach else prompt_pool
        return self.features(pool) @ self.weight + self.bias

    @torch.no_grad()
    def step(self, mean_weight: float) -> None:
        """Take the share `rate` of the residuals out of log Z': move the learned parameters against their gradients,
        which must be those of the whole update's loss over all ranks.

        mean_weight: the mean of the loss's weight over the update's kept rollouts, global; 0: nothing moves. The
        gradient of the loss by log Z'(q) is 2 mean_weight times the weighted mean residual.
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
    """Return the mean [b, H] fp32 of hidden [s, b, H] over the prompt's positions, True in prompt_mask [b, s]."""
    mask = prompt_mask.t().unsqueeze(-1).float()
    return (hidden.float() * mask).sum(dim=0) / mask.sum(dim=0)


def _normalised(values: Tensor) -> Tensor:
    """Return values [..., k] in fp32 with mean 0 and variance 1 over the last dimension."""
    return layer_norm(values.float(), values.shape[-1:])


def _deviation(values: Tensor, centre: Tensor) -> Tensor:
    """Return values - centre, scaled to mean square 1 over the last dimension, or to less where it is below SMALLEST
    before."""
    deviation = values - centre
    return deviation * deviation.square().mean(dim=-1, keepdim=True).clamp(min=SMALLEST).rsqrt()


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """Make a linear layer with the distribution of nn.Linear's own initialisation, drawn from `generator`."""
    layer = nn.Linear(inputs, outputs)
    bound = inputs**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer
