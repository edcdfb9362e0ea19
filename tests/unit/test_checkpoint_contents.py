"""The sums of a checkpoint's tensors: equal however they are cut, different as soon as anything else is."""

from __future__ import annotations

import pytest
import torch

from megatron_powerflow.checkpoint import contents
from megatron_powerflow.checkpoint.contents import Piece, Sums, is_finite, sum_of, sums_of

WHOLE = torch.randn(4, 6, 10, generator=torch.Generator().manual_seed(1))


def piece(data: torch.Tensor, *offset: int, name: str = "a") -> Piece:
    return Piece(name, data, tuple(WHOLE.shape), offset)


def total(*pieces: Piece) -> int:
    return sum(sum_of(one) for one in pieces) % 2**64


@pytest.mark.parametrize("piece_size", [2**18, 7])
def test_the_sum_does_not_depend_on_the_cut(monkeypatch, piece_size):
    monkeypatch.setattr(contents, "PIECE", piece_size)
    whole = sum_of(piece(WHOLE, 0, 0, 0))
    for axis in range(3):
        halves = WHOLE.chunk(2, dim=axis)
        offsets = [[0, 0, 0], [0, 0, 0]]
        offsets[1][axis] = halves[0].shape[axis]
        assert total(*(piece(half, *offset) for half, offset in zip(halves, offsets, strict=True))) == whole
    # a layer by itself, with or without its leading axis, and cut within
    assert total(*(piece(WHOLE[i], i, 0, 0) for i in range(4))) == whole
    assert total(*(piece(WHOLE[i : i + 1, :, j : j + 5], i, 0, j) for i in range(4) for j in (0, 5))) == whole


def test_the_sum_shows_every_change():
    whole = sum_of(piece(WHOLE, 0, 0, 0))
    flipped = WHOLE.clone()
    flipped.view(torch.int32)[2, 3, 4] ^= 1
    swapped = WHOLE.clone()
    swapped[0, 0, 0], swapped[0, 0, 1] = WHOLE[0, 0, 1].clone(), WHOLE[0, 0, 0].clone()
    others = [piece(flipped, 0, 0, 0), piece(swapped, 0, 0, 0), piece(WHOLE, 0, 0, 0, name="b")]
    assert all(sum_of(other) != whole for other in others)
    assert total(*(piece(WHOLE[i], 3 - i, 0, 0) for i in range(4))) != whole  # layers in another order
    assert total(piece(WHOLE[:2], 0, 0, 0)) != whole


def test_rows_of_zeros_at_the_end_do_not_count():
    """The vocabulary is padded to another size under another tensor-parallel size."""
    padded = torch.cat([WHOLE[0], torch.zeros(2, 10)])
    longer = Piece("a", padded, (8, 10), (0, 0))
    assert sum_of(longer) == sum_of(Piece("a", WHOLE[0], (6, 10), (0, 0)))


def test_kinds_are_told_apart_by_name():
    one = torch.ones(3, dtype=torch.bfloat16)

    def of(name: str, data: torch.Tensor = one) -> Sums:
        return sums_of([Piece(name, data, (3,), (0,))])

    assert of("decoder.w").weights
    assert not of("decoder.w").moments
    assert of("optimizer.state.exp_avg.decoder.w").moments
    assert of("optimizer.state.fp32_param.decoder.w") == of("optimizer.state.param.decoder.w")
    assert of("optimizer.state.param.decoder.w").num_masters == 3
    assert not of("decoder.w", torch.tensor([1.0, float("nan"), 2.0])).is_finite
    assert of("optimizer.state.exp_avg.w", torch.tensor([1.0, float("nan"), 2.0])).is_finite  # asked of weights only
    assert not (of("decoder.w") + of("decoder.w", torch.full((3,), float("inf")))).is_finite


def test_a_sum_that_overflows_is_no_infinite_weight():
    assert is_finite(torch.full((4,), 3e38))
    assert not is_finite(torch.tensor([1.0, float("-inf"), float("inf")]))


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0)])
def test_any_shape(shape):
    assert 0 <= sum_of(Piece("a", torch.ones(shape), shape, (0,) * len(shape))) < 2**64
