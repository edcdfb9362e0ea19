"""The cache takes its memory once, for all rows at their longest; rows come, go and stay where they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_powerflow.model import kv_cache
from megatron_powerflow.model.attention import Rule, cached_attention
from megatron_powerflow.model.kv_cache import KVCache

GROUPS, WIDTH, LIMIT, ROWS = 2, 4, 300, 6


class Chunk:
    """A chunk that keeps what it was told."""

    def set_decoding(self, positions, cache):
        self.positions = positions


def make_cache(at_once: bool = False) -> KVCache:
    sizes = (2, ROWS, GROUPS, (WIDTH, WIDTH), LIMIT, torch.float32, torch.device("cpu"))
    return KVCache(*sizes, length_step=1, at_once=at_once)


@pytest.fixture
def cache(monkeypatch):
    """As on a GPU: room for all, and what the memory holds at first may be NaN."""
    empty = torch.empty
    monkeypatch.setattr(kv_cache.torch, "empty", lambda *size, **kwargs: empty(*size, **kwargs).fill_(torch.nan))
    return make_cache(at_once=True)


def prefill(cache: KVCache, rows: list[int], length: int, seed: int) -> None:
    """One prompt for these rows, its keys and values drawn from the seed; both layers."""
    draw = torch.Generator().manual_seed(seed)
    with cache.prefilling(Chunk(), [length], np.array([rows]), padding=0):
        for layer in range(2):
            q, k, v = (torch.randn(length, 1, heads, WIDTH, generator=draw) for heads in (2 * GROUPS, GROUPS, GROUPS))
            cached_attention(q, k, v, cache, layer, Rule())


def decode(cache: KVCache, alive: list[bool], seed: int) -> torch.Tensor:
    """[rows, h * d] of both layers, behind each other."""
    draw = torch.Generator().manual_seed(seed)
    outputs = []
    with cache.decoding(Chunk(), np.array(alive), padding=0):
        for layer in range(2):
            shape = (len(alive), 1)
            q, k, v = (torch.randn(*shape, heads, WIDTH, generator=draw) for heads in (2 * GROUPS, GROUPS, GROUPS))
            outputs.append(cached_attention(q, k, v, cache, layer, Rule())[:, 0])
    return torch.cat(outputs, dim=1)


def pointers(cache: KVCache) -> list[int]:
    return [stored.data_ptr() for layer in cache.layers for stored in layer]


def test_memory_is_taken_once_for_the_longest_and_never_moves(cache):
    before = pointers(cache)
    assert len(set(before)) == 4  # layers have their own
    assert cache.layers[0].keys.shape == (ROWS, GROUPS, LIMIT, WIDTH)
    cache.add_rows(4)
    prefill(cache, [0, 1], 100, seed=1)
    prefill(cache, [2, 3], 140, seed=2)
    for step in range(150):  # over two steps of zeros, up to the limit's last one
        assert decode(cache, [True] * 4, seed=10 + step).isfinite().all()
    assert cache.lengths.tolist() == [250, 250, 290, 290]
    cache.select(np.array([1, 3]))
    cache.add_rows(2)
    prefill(cache, [2, 3], 5, seed=3)
    assert pointers(cache) == before


def test_on_a_cpu_memory_grows_with_what_is_in_use():
    grown, sizes = make_cache(), []
    for count, length in ((2, 5), (1, 130), (3, 200)):
        first = grown.num_rows
        grown.add_rows(count)
        prefill(grown, list(range(first, first + count)), length, seed=first)
        assert decode(grown, [True] * grown.num_rows, seed=9).isfinite().all()
        sizes.append(tuple(grown.layers[1].values.shape))
    assert sizes == [(2, GROUPS, 128, WIDTH), (3, GROUPS, 256, WIDTH), (6, GROUPS, 256, WIDTH)]


def test_what_is_computed_does_not_depend_on_the_room(cache):
    grown = make_cache()
    for each in (grown, cache):
        each.add_rows(2)
        prefill(each, [0, 1], 100, seed=1)
    for step in range(60):
        assert torch.equal(decode(grown, [True, step < 40], seed=step), decode(cache, [True, step < 40], seed=step))


def test_rows_that_move_up_and_rows_that_join_are_as_in_a_cache_of_their_own(cache):
    cache.add_rows(4)
    prefill(cache, [0, 1, 2, 3], 7, seed=1)
    decode(cache, [True] * 4, seed=2)
    whole = decode(cache, [True] * 4, seed=3)
    alone = make_cache()
    alone.add_rows(4)
    prefill(alone, [0, 1, 2, 3], 7, seed=1)
    decode(alone, [True] * 4, seed=2)
    alone.select(np.array([1, 3]))
    assert alone.lengths.tolist() == [8, 8]
    draw = torch.Generator().manual_seed(3)  # the same new tokens for the two rows that are left
    outputs = []
    with alone.decoding(Chunk(), np.array([True, True]), padding=0):
        for layer in range(2):
            new = [torch.randn(4, 1, heads, WIDTH, generator=draw)[[1, 3]] for heads in (2 * GROUPS, GROUPS, GROUPS)]
            outputs.append(cached_attention(*new, alone, layer, Rule())[:, 0])
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole[[1, 3]])


def test_more_rows_than_there_is_memory_for_are_a_bug(cache):
    cache.add_rows(ROWS)
    with pytest.raises(AssertionError):
        cache.add_rows(1)
