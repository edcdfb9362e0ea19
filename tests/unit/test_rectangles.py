"""A run of a flattened tensor, as rectangles of the tensor: which elements they hold, in which order, and how many."""

from __future__ import annotations

import math

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.checkpoint.rectangles import HeldRectangles, RectanglePlanner, rectangles


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_rectangles_hold_the_elements_of_a_run_in_their_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole = torch.arange(size).view(shape)
    found = list(rectangles(shape, start, stop))
    elements = []
    for offset, extent, first in found:
        part = whole[tuple(slice(begin, begin + length) for begin, length in zip(offset, extent, strict=True))]
        assert tuple(part.shape) == extent
        assert part.flatten()[0] == first
        elements += part.flatten().tolist()
    assert elements == list(range(start, stop))
    assert len(found) <= 2 * len(shape) - 1


def test_the_rest_of_a_row_whole_rows_and_the_beginning_of_one():
    assert list(rectangles((5, 4), 3, 14)) == [
        ((0, 3), (1, 1), 3),
        ((1, 0), (2, 4), 4),
        ((3, 0), (1, 2), 12),
    ]
    assert list(rectangles((5, 4), 0, 20)) == [((0, 0), (5, 4), 0)]
    assert list(rectangles((5, 4), 5, 7)) == [((1, 1), (1, 2), 5)]


def test_torch_is_told_where_each_part_is_and_finds_it_there():
    parts = {(0, 2): torch.ones(1, 2), (1, 0): torch.zeros(3, 4)}
    held = HeldRectangles((5, 4), parts)
    items = held.__create_write_items__("name", held)
    assert [tuple(item.index.offset) for item in items] == list(parts)
    assert [tuple(item.tensor_data.chunk.sizes) for item in items] == [(1, 2), (3, 4)]
    assert {tuple(item.tensor_data.size) for item in items} == {(5, 4)}
    for item in items:
        assert held.__get_tensor_shard__(item.index) is parts[tuple(item.index.offset)]


def test_torch_loads_into_parts_what_it_saved_whole(tmp_path):
    dcp.save({"name": torch.arange(20.0).view(5, 4)}, checkpoint_id=tmp_path)
    held = HeldRectangles((5, 4), {(0, 2): torch.zeros(1, 2), (1, 0): torch.zeros(3, 4)})
    dcp.load({"name": held}, storage_reader=dcp.FileSystemReader(tmp_path), planner=RectanglePlanner(), no_dist=True)
    assert held.parts[0, 2].tolist() == [[2.0, 3.0]]
    assert held.parts[1, 0].flatten().tolist() == list(range(4, 16))
