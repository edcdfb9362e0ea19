"""A packed stream is attended to sequence by sequence, whatever lengths stand next to each other."""

from __future__ import annotations

import pytest
import torch

from megatron_powerflow.data.packing import packed_stream
from megatron_powerflow.model import attention
from megatron_powerflow.model.attention import Rule, causal_attention, pieced_attention
from megatron_powerflow.model.stream import Pieces

HEADS, GROUPS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6
LENGTHS = [7, 7, 7, 4, 3, 3, 7, 1, 1, 1, 1]  # sorted in a run, but for one


def stream() -> Pieces:
    pieces = packed_stream(LENGTHS, 7, 48, 1, 0, 1, torch.device("cpu")).pieces  # and padding of 6 positions
    return Pieces(qkv_format="sbhd", pieces=pieces)


@pytest.mark.parametrize("rule", [Rule(), Rule(scale=0.3, window=3), Rule(softcap=2.0), Rule(window=5, softcap=2.0)])
def test_sequences_of_one_length_at_a_time_are_each_by_itself(rule, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    shapes = ((HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, VALUE_WIDTH))
    query, key, value = (torch.randn(48, 1, heads, width, generator=draw) for heads, width in shapes)
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].shape)
        return causal_attention(*arguments)

    monkeypatch.setattr(attention, "causal_attention", counted)
    packed = pieced_attention(query, key, value, stream(), rule)
    assert packed.shape == (48, 1, HEADS * VALUE_WIDTH)
    assert [(shape[0], shape[2]) for shape in calls] == [(3, 7), (1, 4), (2, 3), (1, 7), (4, 1), (1, 6)]
    start = 0
    for length in [*LENGTHS, 6]:
        part = slice(start, start + length)
        q, k, v = (tensor[part].permute(1, 2, 0, 3) for tensor in (query, key, value))
        alone = causal_attention(q, k, v, rule).permute(2, 0, 1, 3).flatten(2)
        torch.testing.assert_close(packed[part], alone, rtol=1e-5, atol=1e-6)
        start += length
