"""What is log Z'(q) when nobody learns it? Estimates from the group's own responses, as pure [B] functions.

With s = `partial_residual` = (S - alpha * S_ref)/n - alpha * psi, a zero residual means that s is the same for every
response of a prompt, so minus its mean estimates log Z'. All are detached: the gradient of the loss is then
2 w (s + log_z) ds / B.

    group        minus the w-weighted mean of the group; its expected gradient is (1 - 1/G) times calibrated LA-TB's
    loo          minus the w-weighted mean of the others; factor 1
    contrastive  pairwise differences (s_i - s_j)^2 / 2 over the group, which needs no log Z' at all: its gradient is
                 that of `loo` for w = 1

Left out: gathering the group; a group is always whole on its data-parallel rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_log_z(partial: Tensor, group: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """[B] -> [B]: minus the w-weighted mean of `partial` over the kept members of each one's group. Detached."""
    total, mass, _ = _group_sums(partial, group, weight, kept)
    return -(total / mass)


def loo_log_z(partial: Tensor, group: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """[B] -> [B]: the same over the other members; a response alone in its group gets residual 0. Detached."""
    total, mass, count = _group_sums(partial, group, weight, kept)
    own = torch.where(kept, weight, 0.0)
    others = mass - own
    alone = (count < 2) | (others <= 0)
    estimate = -(total - own * partial.detach()) / torch.where(alone, 1.0, others)
    return torch.where(alone, -partial.detach(), estimate)


def contrastive_log_z(partial: Tensor, group: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """[B] -> (log_z [B], factor [B]): pairwise TB written as LA-TB with the group mean and a factor G/(G-1).

    (1 / (G - 1)) * sum_{i<j} w_i w_j (s_i - s_j)^2 = (W / (G - 1)) * sum_i w_i (s_i - mean_w s)^2 with W the sum of
    w; for w = 1 the factor is G/(G-1) and the gradient equals that of `loo`.
    """
    total, mass, count = _group_sums(partial, group, weight, kept)
    return -(total / mass), mass / (count - 1).clamp(min=1)


def _group_sums(partial: Tensor, group: Tensor, weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per member: sum of w * s, sum of w, and number of kept members of its group."""
    _, place = group.unique(return_inverse=True)
    own = torch.where(kept, weight, 0.0).detach()

    def per_group(values: Tensor) -> Tensor:
        sums = values.new_zeros(int(place.max()) + 1).index_add_(0, place, values)
        return sums[place]

    total = per_group(own * torch.where(kept, partial.detach(), 0.0))
    mass = per_group(own)
    return total, torch.where(mass > 0, mass, 1.0), per_group(kept.to(own.dtype))
