"""What is log Z'(q) when nobody learns it? It is estimated from the group's own responses, by pure [B] functions.

With s = `partial_residual`, which for LA-TB is (S - alpha * S_ref)/n - alpha * psi, a zero residual means that s is the
same for every response of a prompt, so minus its mean estimates log Z'. All estimates are detached: the gradient of the
loss is then 2 w (s + log_z) ds / B.

    group        minus the w-weighted mean of the group; its expected gradient is (1 - 1/G) times calibrated LA-TB's
    loo          minus the w-weighted mean of the others; factor 1
    contrastive  pairwise differences (s_i - s_j)^2 / 2 over the group, which needs no log Z' at all: its gradient is
                 that of `loo` for w = 1

Left out: gathering the group; a group is always whole on its data-parallel rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def group_log_z(partial: Tensor, group: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """Return minus the weighted mean of `partial` over the kept members of each response's group.

    partial: [B], `partial_residual`; group: [B] int64; weight: [B] w; kept: [B] bool. Returns [B], detached.
    """
    sums = _group_sums(partial, group, weight, kept)
    return -(sums.weighted / sums.weight)


def loo_log_z(partial: Tensor, group: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
    """Return `group_log_z` over the other members of each response's group ("leave one out").

    Arguments are those of `group_log_z`. Returns [B], detached; a response without others gets a residual of 0.
    """
    sums = _group_sums(partial, group, weight, kept)
    member_weight = torch.where(kept, weight, 0.0)
    others = sums.weight - member_weight
    alone = (sums.num_kept < 2) | (others <= 0)
    estimate = -(sums.weighted - member_weight * partial.detach()) / torch.where(alone, 1.0, others)
    return torch.where(alone, -partial.detach(), estimate)


class ContrastiveEstimate(NamedTuple):
    """log_z: [B], detached. factor: [B], what the loss's weight is multiplied by."""

    log_z: Tensor
    factor: Tensor


def contrastive_log_z(partial: Tensor, group: Tensor, weight: Tensor, kept: Tensor) -> ContrastiveEstimate:
    """Return what makes LA-TB the pairwise loss: the group's mean as log Z', and a factor W / (G - 1) for the weight.

    Arguments are those of `group_log_z`.
    (1 / (G - 1)) * sum_{i<j} w_i w_j (s_i - s_j)^2 = (W / (G - 1)) * sum_i w_i (s_i - mean_w s)^2 with W the sum of
    w; for w = 1 the factor is G/(G-1) and the gradient equals that of `loo`.
    """
    sums = _group_sums(partial, group, weight, kept)
    return ContrastiveEstimate(-(sums.weighted / sums.weight), sums.weight / (sums.num_kept - 1).clamp(min=1))


class _GroupSums(NamedTuple):
    """Sums over the kept members of each response's group, all [B]: of w * s, of w (1 where that is 0), and of 1."""

    weighted: Tensor
    weight: Tensor
    num_kept: Tensor


def _group_sums(partial: Tensor, group: Tensor, weight: Tensor, kept: Tensor) -> _GroupSums:
    _, group_index = group.unique(return_inverse=True)
    member_weight = torch.where(kept, weight, 0.0).detach()

    def per_group(values: Tensor) -> Tensor:
        sums = values.new_zeros(int(group_index.max()) + 1).index_add_(0, group_index, values)
        return sums[group_index]

    weighted = per_group(member_weight * torch.where(kept, partial.detach(), 0.0))
    total_weight = per_group(member_weight)
    count = per_group(kept.to(member_weight.dtype))
    return _GroupSums(weighted, torch.where(total_weight > 0, total_weight, 1.0), count)
