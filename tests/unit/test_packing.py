"""Rollouts become micro-batches: labels are rolled once, masks fit, EOS counts."""

from __future__ import annotations

import pytest
import torch

from megatron_powerflow.data.packing import Annotated, pack
from megatron_powerflow.data.response_format import format_penalty, last_boxed
from megatron_powerflow.records import Prompt, Rollout

CPU = torch.device("cpu")


def rollout(prompt, response, *, slot=0, index=0, reason="eos", task=None) -> Rollout:
    return Rollout(
        Prompt(str(slot), slot, tuple(prompt), task=task),
        slot,
        index,
        tuple(response),
        tuple(-0.5 - i for i in range(len(response))),
        reason,
    )


def packed(rollouts, **changes):
    arguments = {
        "micro_batch_size": 2,
        "responses_per_prompt": 2,
        "drop_truncated": False,
        "multiple": 1,
        "uniform": False,
        "device": CPU,
    } | changes
    return pack([Annotated(item) for item in rollouts], **arguments)


def test_the_example_of_the_record():
    (batch,) = packed([rollout([7, 8], [9, 2])])
    assert batch.tokens.tolist() == [[7, 8, 9, 2]]
    assert batch.targets.tolist() == [[8, 9, 2, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, False]]
    assert batch.prompt_mask.tolist() == [[True, True, False, False]]
    assert batch.rollout_log_probs.tolist() == [[0.0, -0.5, -1.5, 0.0]]
    assert batch.num_response_tokens.tolist() == [2]  # EOS (2) counts


def test_every_masked_target_is_a_response_token_and_none_is_missing():
    rollouts = [rollout([1] * p, range(3, 3 + n), slot=p, index=n % 2) for p, n in ((1, 1), (4, 2), (2, 9), (3, 3))]
    for batch in packed(rollouts):
        for row in range(len(batch.tokens)):
            (source,) = [r for r in rollouts if r.slot * 2 + r.response_index == int(batch.rollout_index[row])]
            assert batch.targets[row][batch.loss_mask[row]].tolist() == list(source.response_token_ids)
            assert int(batch.num_response_tokens[row]) == len(source.response_token_ids)


def test_long_ones_come_first_and_padding_ends_with_the_longest():
    rollouts = [rollout([1] * length, [5], slot=length) for length in (2, 9, 4, 7)]
    shapes = [batch.tokens.shape for batch in packed(rollouts)]
    assert shapes == [(2, 10), (2, 5)]
    assert [batch.tokens.shape for batch in packed(rollouts, multiple=4)] == [(2, 12), (2, 8)]
    assert [batch.tokens.shape for batch in packed(rollouts, uniform=True)] == [(2, 10), (2, 10)]


def test_the_order_does_not_depend_on_the_order_given():
    rollouts = [rollout([1] * (1 + i % 3), [5] * (1 + i % 2), slot=i // 2, index=i % 2) for i in range(8)]
    forward, backward = packed(rollouts), packed(rollouts[::-1])
    for one, other in zip(forward, backward, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.rollout_index, other.rollout_index)


def test_truncated_responses_are_kept_or_dropped_as_declared():
    rollouts = [rollout([1], [5, 2]), rollout([1], [5, 5], index=1, reason="length")]
    (kept,) = packed(rollouts)
    (dropped,) = packed(rollouts, drop_truncated=True)
    assert kept.kept.all()
    assert (dropped.kept == ~dropped.truncated).all()
    assert dropped.truncated.sum() == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{19}", "19"),
        ("\\boxed{1} then \\boxed{ 2 }", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{3} and \\boxed{4", "3"),
        ("\\boxed{}", None),
        ("boxed{3}", None),
        ("\\boxed{", None),
        ("}}{\\boxed{{a}{b}}}", "{a}{b}"),
        ("", None),
    ],
)
def test_the_last_complete_box_counts(text, answer):
    assert last_boxed(text) == answer


def test_psi_is_for_responses_without_a_box_outside_exempt_tasks():
    item = rollout([1], [2], task="reasoning")
    assert format_penalty(item, False, psi=-0.5, exempt_tasks=["creative"]) == -0.5
    assert format_penalty(item, True, psi=-0.5, exempt_tasks=["creative"]) == 0.0
    creative = rollout([1], [2], task="creative")
    assert format_penalty(creative, False, psi=-0.5, exempt_tasks=["creative"]) == 0.0
    assert format_penalty(rollout([1], [2]), False, psi=-0.5, exempt_tasks=["creative"]) == -0.5
