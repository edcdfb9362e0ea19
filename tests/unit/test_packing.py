"""Rollouts become micro-batches: labels are rolled once, masks fit, EOS counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.data.bins import BinRule
from megatron_powerflow.data.boxes import last_boxed
from megatron_powerflow.data.packing import AnnotatedRollout, pack, pack_streams, packed_stream, row_stream
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.training.rewards import format_penalty

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
    return pack([AnnotatedRollout(item) for item in rollouts], **arguments)


def test_the_example_of_the_record():
    (batch,) = packed([rollout([7, 8], [9, 2])])
    assert batch.tokens.tolist() == [[7, 8, 9, 2]]
    assert batch.targets.tolist() == [[8, 9, 2, 0]]
    assert batch.loss_mask.tolist() == [[False, True, True, False]]
    assert batch.prompt_mask.tolist() == [[True, True, False, False]]
    assert batch.rollout_log_probs.tolist() == [[0.0, -0.5, -1.5, 0.0]]
    assert batch.num_response_tokens.tolist() == [2]  # EOS (2) counts
    assert batch.responses.in_rows.tolist() == batch.responses.in_model.tolist() == [1, 2]
    assert batch.prompts.in_rows.tolist() == batch.prompts.in_model.tolist() == [0, 1]


@pytest.mark.parametrize("cp_size", [1, 2])
def test_a_chosen_token_is_the_same_in_the_rows_and_in_the_model(cp_size):
    """Its hidden state would be where `in_model` says, of states [t / cp, r] that are made of the tokens themselves."""
    lengths = ((3, 2), (1, 5), (4, 4))
    rollouts = [
        rollout(list(range(20, 20 + p)), list(range(40, 40 + n)), slot=slot) for slot, (p, n) in enumerate(lengths)
    ]
    seen = {"responses": [], "prompts": []}
    for rank in range(cp_size):
        (padded,) = packed(rollouts, micro_batch_size=3, multiple=2 * cp_size, cp_rank=rank, cp_size=cp_size)
        (packed_batch,) = streams_of([rollouts], sequence=2 * cp_size, total=2 * cp_size, cp_rank=rank, cp_size=cp_size)
        for batch in (padded, packed_batch):
            stream = batch.stream
            tokens = batch.tokens if stream is None else batch.tokens.flatten()[stream.index.clamp(min=0)]
            states = tokens.t()  # [t / cp, r]
            for name, found in seen.items():
                chosen = getattr(batch, name)
                assert states.flatten()[chosen.in_model].tolist() == batch.tokens.flatten()[chosen.in_rows].tolist()
                found += [(batch is padded, number) for number in chosen.in_rows.tolist()]
    for name, mask in (("responses", padded.loss_mask), ("prompts", padded.prompt_mask)):
        whole = [(True, number) for number in mask.flatten().nonzero().squeeze(1).tolist()]
        assert sorted(item for item in seen[name] if item[0]) == whole
        assert len(seen[name]) == 2 * len(whole)


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


def test_a_prompt_that_comes_twice_in_a_step_makes_two_groups():
    """The slot names a group, not the prompt's line in its file."""
    twice = [replace(rollout([1], [5, 6], slot=7, index=i), slot=slot) for slot in (0, 1) for i in (0, 1)]
    (batch,) = packed(twice, micro_batch_size=4)
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert batch.rollout_index.tolist() == [0, 1, 2, 3]


def test_what_the_text_says_goes_with_its_rollout():
    items = [
        AnnotatedRollout(rollout([1], [5, 6]), psi=-0.5, reward=2.0),
        AnnotatedRollout(rollout([1], [5], index=1), reward=3.0, lag=(4.0, 2.0, 3.0)),
    ]
    (batch,) = pack(
        items, micro_batch_size=2, responses_per_prompt=2, drop_truncated=False, multiple=1, uniform=False, device=CPU
    )
    assert batch.psi.tolist() == [-0.5, 0.0]
    assert batch.reward.tolist() == [2.0, 3.0]
    assert batch.annotations.isnan().all()
    assert batch.lag.tolist() == [[0, 0, 1], [4, 2, 3]]


def test_the_long_ones_come_first_in_a_stream_too():
    (batch,) = streams_of([[rollout([1], [5]), rollout([1, 1, 1], [5, 6], index=1)]])
    assert batch.num_response_tokens.tolist() == [2, 1]
    assert batch.rollout_index.tolist() == [1, 0]


def test_truncated_responses_are_kept_or_dropped_as_declared():
    rollouts = [rollout([1], [5, 2]), rollout([1], [5, 5], index=1, reason="length")]
    (kept,) = packed(rollouts)
    (dropped,) = packed(rollouts, drop_truncated=True)
    assert kept.kept.all()
    assert (dropped.kept == ~dropped.truncated).all()
    assert dropped.truncated.tolist() == [False, True]


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


def streams_of(bins, *, max_tokens=32, sequence=1, total=1, uniform=False, cp_rank=0, cp_size=1):
    return pack_streams(
        [[AnnotatedRollout(item) for item in bin] for bin in bins],
        BinRule(max_tokens, sequence, total, 1),
        responses_per_prompt=2,
        drop_truncated=False,
        uniform=uniform,
        device=CPU,
        cp_rank=cp_rank,
        cp_size=cp_size,
    )


def test_the_examples_of_a_stream():
    pair = [rollout([7, 8], [9, 2]), rollout([5], [6, 2], index=1)]
    (batch,) = streams_of([pair])
    assert batch.tokens.tolist() == [[7, 8, 9, 2], [5, 6, 2, 0]]
    assert batch.stream.index.tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert batch.stream.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.stream.pieces == ((0, 4, 0, 4), (4, 7, 4, 7))
    assert batch.stream.cu_seqlens.tolist() == [0, 4, 7]
    (batch,) = streams_of([pair], sequence=4, total=4, cp_size=2)
    assert batch.stream.index.tolist() == [[0, 3, 4, -1]]
    assert batch.stream.positions.tolist() == [0, 3, 0, 3]
    assert batch.stream.pieces == ((0, 1, 0, 1), (1, 2, 0, 4), (2, 3, 4, 5), (3, 4, 4, 8))
    assert batch.stream.key_order.tolist() == [0, 4, 5, 1, 2, 6, 7, 3]
    assert batch.stream.cu_seqlens.tolist() == [0, 4, 8]


@given(
    lengths=st.lists(st.integers(1, 9), min_size=0, max_size=5),
    cp_size=st.sampled_from([1, 2, 4]),
    total_multiple=st.sampled_from([1, 2, 3]),
)
def test_ranks_share_a_stream_without_loss_and_see_no_neighbour(lengths, cp_size, total_multiple):
    """Each token is on one rank, at its own position; a query's keys are those of its sequence up to itself."""
    multiple = 2 * cp_size if cp_size > 1 else 1
    row = max(lengths, default=1)
    padded = [-(-length // multiple) * multiple for length in lengths]
    total = max(-(-sum(padded) // (multiple * total_multiple)), 1) * multiple * total_multiple
    parts = [packed_stream(lengths, row, total, multiple, rank, cp_size, CPU) for rank in range(cp_size)]
    index = torch.cat([part.index[0] for part in parts])
    positions = torch.cat([part.positions for part in parts])
    real = index >= 0
    expected = {number * row + position: position for number, n in enumerate(lengths) for position in range(n)}
    assert dict(zip(index[real].tolist(), positions[real].tolist(), strict=True)) == expected
    assert len(index) == total
    keys = index if cp_size == 1 else index[parts[0].key_order]  # in the order of the stream
    assert keys[keys >= 0].tolist() == sorted(expected)
    for part in parts:
        queries = [query for first, end, _, _ in part.pieces for query in range(first, end)]
        assert queries == list(range(total // cp_size))
        for first, end, first_key, end_key in part.pieces:
            for query in range(first, end):
                seen = keys[first_key : end_key - (end - 1 - query)].tolist()
                own = int(part.index[0, query])
                if own >= 0:
                    assert seen == list(range(own - int(part.positions[query]), own + 1))


def test_context_parallel_ranks_have_equally_many_keys_to_attend_to():
    def keys_seen(stream):
        return sum(end_key - first_key - back for a, b, first_key, end_key in stream.pieces for back in range(b - a))

    seen = [keys_seen(row_stream(3, 48, rank, 4, CPU)) for rank in range(4)]
    assert len(set(seen)) == 1
    assert sum(seen) == 48 * 49 // 2


def test_streams_are_alike_where_the_pipeline_wants_it_and_a_dummy_has_no_rollouts():
    bins = [[rollout([1] * 5, [5, 6])], [rollout([1], [5], index=1)], []]
    batches = streams_of(bins, total=2, uniform=True)
    assert [batch.stream.num_positions for batch in batches] == [8, 8, 8]
    assert [batch.stream.cu_seqlens.tolist() for batch in batches] == [[0, 7, 8], [0, 2, 8], [0, 8]]
    dummy = batches[-1]
    assert dummy.tokens.shape[0] == len(dummy.psi) == len(dummy.annotations) == len(dummy.lag) == 0
    assert (dummy.stream.index == -1).all()
    assert [batch.stream.num_positions for batch in streams_of(bins, total=2)] == [8, 2, 2]
