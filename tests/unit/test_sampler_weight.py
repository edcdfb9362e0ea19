"""The weight v = min(trainer at the start / sampler, cap) against numbers worked by hand; nothing flows through it.

Three responses of 3, 2 and 1 tokens, S_old - S_sampler by token (.1 .2 .3), (-1 0), (1): .6, -1, 1.
"""

from __future__ import annotations

import math

import pytest
import torch

from megatron_powerflow.objective.sampler_weight import sampler_token_weight, sampler_weight
from tests.batches import rows, scored_batch

SAMPLER = ((-1, -2, -3), (-1, -3), (-2,))
OLD = ((-0.9, -1.8, -2.7), (-2, -3), (-1,))
BATCH = scored_batch(SAMPLER)
NUM_TOKENS = BATCH.num_response_tokens


def weights(ratio: str, cap: float):
    found = sampler_weight(rows(OLD).sum(dim=1), rows(SAMPLER).sum(dim=1), NUM_TOKENS, ratio=ratio, cap=cap)
    return found.weight.tolist(), found.truncated.tolist()


@pytest.mark.parametrize(
    ("ratio", "cap", "weight", "truncated"),
    [
        ("none", 1.0, [1, 1, 1], [0, 0, 0]),
        ("seq", 10.0, [math.exp(0.6), math.exp(-1), math.e], [0, 0, 0]),
        ("seq", 2.0, [math.exp(0.6), math.exp(-1), 2], [0, 0, 1]),
        ("seq", 1.0, [1, math.exp(-1), 1], [1, 0, 1]),  # from above alone
        ("seq_mean", 10.0, [math.exp(0.2), math.exp(-0.5), math.e], [0, 0, 0]),
        ("seq_mean", 1.1, [1.1, math.exp(-0.5), 1.1], [1, 0, 1]),
    ],
)
def test_the_weight_of_a_response_by_hand(ratio, cap, weight, truncated):
    assert weights(ratio, cap) == (pytest.approx(weight), truncated)


def test_the_weight_of_a_token_by_hand():
    found = sampler_token_weight(rows(OLD), rows(SAMPLER), BATCH.loss_mask, NUM_TOKENS, cap=1.25)
    expected = [[math.exp(0.1), math.exp(0.2), 1.25], [math.exp(-1), 1], [1.25]]
    for values, mask, row in zip(found.weight, BATCH.loss_mask, expected, strict=True):
        assert values[mask].tolist() == pytest.approx(row)
        assert (values[~mask] == 1).all()  # prompts and padding
    assert found.truncated.tolist() == pytest.approx([1 / 3, 0, 1])


def test_padding_has_weight_1_whatever_stands_there():
    old, sampler = rows(OLD) + 7.0, rows(SAMPLER)
    found = sampler_token_weight(old, sampler, BATCH.loss_mask, NUM_TOKENS, cap=2.0)
    assert (found.weight[~BATCH.loss_mask] == 1).all()
    assert found.truncated.tolist() == [1, 1, 1]


def test_a_ratio_beyond_all_numbers_is_the_cap_and_none_is_0():
    old, sampler, ones = torch.tensor([0.0, -2000.0]), torch.tensor([-2000.0, 0.0]), torch.ones(2)
    found = sampler_weight(old, sampler, ones, ratio="seq", cap=2.0)
    assert found.weight.tolist() == [2, 0]


def test_what_is_not_finite_does_not_become_a_weight():
    """The loss is then not finite, and the step is skipped."""
    nan = torch.tensor([torch.nan])
    assert sampler_weight(nan, torch.zeros(1), torch.ones(1), ratio="seq", cap=2.0).weight.isnan().all()


def test_nothing_flows_through_it():
    old, mask = rows(OLD).requires_grad_(), BATCH.loss_mask
    arguments = (old.sum(dim=1), rows(SAMPLER).sum(dim=1), NUM_TOKENS)
    for ratio in ("none", "seq", "seq_mean"):
        assert not sampler_weight(*arguments, ratio=ratio, cap=2.0).weight.requires_grad
    assert not sampler_token_weight(old, rows(SAMPLER), mask, NUM_TOKENS, cap=2.0).weight.requires_grad
