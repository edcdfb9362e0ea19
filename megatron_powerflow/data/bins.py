"""Which rollouts share a forward pass? One plan per optimizer update, for all data-parallel ranks at once.

The plan is made of lengths alone, on CPU, so that every rank comes to the same one. Groups are dealt to the ranks by
their FLOPs; then each rank's rollouts are put into micro-batches of a token budget, the same number on every rank.

    groups (FLOPs)  9 5 4 2   --2 ranks, 2 groups each-->   rank 0: 9 2   rank 1: 5 4
    rollouts of a rank        --budget, FLOPs-->            micro-batches, the heaviest first; empty ones are dummies

Left out: tensors (`packing.py`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_powerflow.architecture import Architecture


@dataclass(frozen=True, slots=True)
class BinRule:
    """Says which sizes a micro-batch may have.

    max_tokens: of all its sequences, padding included. sequence_multiple: each sequence is padded to a multiple of this
    (2 cp pieces). total_multiple: the sum is padded to a multiple of this (cp shares that sequence parallelism and FP8
    can split). count_multiple: the number of micro-batches is a multiple of this (pp with interleaving). fewest: their
    number is at least this, where there is something to put into each.
    """

    max_tokens: int
    sequence_multiple: int
    total_multiple: int
    count_multiple: int
    fewest: int = 1

    @property
    def capacity(self) -> int:
        """Returns the most tokens of a micro-batch, padding included."""
        return self.max_tokens // self.total_multiple * self.total_multiple

    def padded(self, num_tokens: int) -> int:
        """Returns the length of a padded sequence, in tokens."""
        return -(-num_tokens // self.sequence_multiple) * self.sequence_multiple


@dataclass(frozen=True, slots=True)
class FlopCount:
    """Counts the FLOPs of one forward pass of a sequence of t tokens: linear * t + quadratic * t^2."""

    linear: float
    quadratic: float

    def __call__(self, num_tokens: int) -> float:
        return self.linear * num_tokens + self.quadratic * num_tokens**2


def flop_count(architecture: Architecture) -> FlopCount:
    """Returns the count of a model's FLOPs.

    Matrix products take 2 FLOPs per weight that a token meets (`active_weights`); causal attention takes half of
    2 t^2 * heads * (width of keys + width of values) per layer, whatever its window.
    """
    a = architecture
    value_head_dim = a.mla.v_head_dim if a.mla else a.head_dim
    quadratic = a.num_layers * a.num_attention_heads * (a.head_dim + value_head_dim)
    return FlopCount(2.0 * active_weights(a), float(quadratic))


def active_weights(architecture: Architecture) -> int:
    """Returns the number of weights that one token is multiplied with.

    They are attention, the MLP or its chosen and shared experts with their router, and the head, tied or not. Looking
    up an embedding multiplies nothing; norms and biases are left out.
    """
    a = architecture
    mlp = 3 * a.hidden_size * a.ffn_hidden_size
    mlps = a.num_layers * mlp
    if x := a.experts:
        a_layer = x.per_token * mlp + 3 * a.hidden_size * (x.shared_ffn_hidden_size or 0) + a.hidden_size * x.num
        mlps = (a.num_layers - x.first_layer) * a_layer
        mlps += x.first_layer * 3 * a.hidden_size * (x.dense_ffn_hidden_size or 0)
    return a.num_layers * _attention_weights(a) + mlps + a.hidden_size * a.vocab_size


def _attention_weights(a: Architecture) -> int:
    """Returns the attention weights of one layer."""
    if a.mla is None:
        return 2 * a.hidden_size * (a.query_width + a.key_width)
    m = a.mla
    queries = a.hidden_size * a.query_width
    if m.q_lora_rank is not None:
        queries = m.q_lora_rank * (a.hidden_size + a.query_width)
    latent = a.hidden_size * (m.kv_lora_rank + m.rope_head_dim)
    keys_and_values = m.kv_lora_rank * a.num_attention_heads * (m.nope_head_dim + m.v_head_dim)
    return queries + latent + keys_and_values + a.num_attention_heads * m.v_head_dim * a.hidden_size


def groups_fit(groups: Sequence[Sequence[int]], rule: BinRule) -> bool:
    """Whether each group fits into one micro-batch. groups: lengths in tokens."""
    return max(sum(map(rule.padded, group)) for group in groups) <= rule.capacity


def plan_update(
    groups: Sequence[Sequence[int]], dp_size: int, rule: BinRule, flops: FlopCount, *, together: bool
) -> list[list[list[tuple[int, int]]]]:
    """Returns, for each data-parallel rank, its micro-batches as lists of (q, i): rollout i of group q.

    groups[q][i]: its length in tokens. Every rank gets equally many micro-batches, of which an empty one is a dummy.
    Groups stay whole on their rank, and every rank gets equally many of them. together: they stay whole in their
    micro-batch, too, for which `groups_fit` must hold. dp_size divides the number of groups, and no rollout is over the
    rule's capacity.
    """
    assert len(groups) % dp_size == 0 and groups
    costs = [sum(flops(length) for length in group) for group in groups]
    ranks = []  # for each rank its units: lists of (q, i) that share a micro-batch in any case
    for dealt in deal(costs, dp_size, len(groups) // dp_size):
        rollouts = [[(q, i) for i in range(len(groups[q]))] for q in dealt]
        ranks.append(rollouts if together else [[item] for group in rollouts for item in group])
    sizes = [[sum(rule.padded(groups[q][i]) for q, i in unit) for unit in units] for units in ranks]
    assert max(map(max, sizes)) <= rule.capacity, "refused by plan_layout before"
    needed = max(len(first_fit(unit_sizes, rule.capacity)) for unit_sizes in sizes)
    wanted = min(rule.fewest, min(map(len, sizes)))
    count = -(-max(needed, wanted) // rule.count_multiple) * rule.count_multiple
    plan = []
    for units, unit_sizes in zip(ranks, sizes, strict=True):
        unit_costs = [sum(flops(groups[q][i]) for q, i in unit) for unit in units]
        bins = fill_evenly(unit_sizes, unit_costs, rule.capacity, count)
        bins.sort(key=lambda bin: (-sum(unit_costs[index] for index in bin), bin))
        plan.append([[item for index in bin for item in units[index]] for bin in bins])
    return plan


def deal(costs: Sequence[float], num_shares: int, per_share: int) -> list[list[int]]:
    """Deals the indices of `costs` into `num_shares` shares of `per_share`, the dearest first to the cheapest share."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    totals = [0.0] * num_shares
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        share = min((s for s in range(num_shares) if len(shares[s]) < per_share), key=lambda s: (totals[s], s))
        shares[share].append(index)
        totals[share] += costs[index]
    return [sorted(share) for share in shares]


def first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Returns bins of indices by first-fit decreasing: at most 11/9 of the fewest, plus 6/9, none over capacity."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in _largest_first(sizes):
        bin_index = next((b for b, free in enumerate(room) if free >= sizes[index]), None)
        if bin_index is None:
            bins.append([])
            room.append(capacity)
            bin_index = len(bins) - 1
        bins[bin_index].append(index)
        room[bin_index] -= sizes[index]
    return bins


def fill_evenly(sizes: Sequence[int], costs: Sequence[float], capacity: int, num_bins: int) -> list[list[int]]:
    """Returns `num_bins` bins of indices, none over capacity, with costs as even as they can easily be made.

    Bins stay empty where there are too few sizes to fill them. num_bins is at least what `first_fit` needs.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals, room = [0.0] * num_bins, [capacity] * num_bins
    for index in _largest_first(sizes):
        fitting = [b for b in range(num_bins) if room[b] >= sizes[index]]
        if not fitting:  # even costs have wasted room
            dense = first_fit(sizes, capacity)
            return dense + [[] for _ in range(num_bins - len(dense))]
        bin_index = min(fitting, key=lambda b: (totals[b], b))
        bins[bin_index].append(index)
        totals[bin_index] += costs[index]
        room[bin_index] -= sizes[index]
    return bins


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
