"""What a sender packs is what a receiver unpacks, to the bit, whatever the sizes of tensors and frames."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_powerflow.serving.on_server.powerflow_weight_files import checksum
from megatron_powerflow.serving.on_server.powerflow_weight_stream import (
    ALIGNMENT,
    Frame,
    frames,
    own_address,
    put_frame,
    take_frame,
    tensors_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def through(pairs, frame_bytes: int) -> tuple[list[tuple[str, torch.Tensor]], list[int]]:
    """What a receiver has of some tensors, and the bytes of each payload. Every message is a copy, as on a wire."""
    wire: list[torch.Tensor] = []
    sizes = []
    for frame in frames(pairs, frame_bytes):
        sizes.append(frame.payload.numel())
        put_frame(frame, lambda tensor: wire.append(tensor.clone()), CPU)
    put_frame(None, lambda tensor: wire.append(tensor.clone()), CPU)
    coming, received = iter(wire), []
    while (frame := take_frame(lambda tensor: tensor.copy_(next(coming)), CPU)) is not None:
        received.extend(tensors_of(frame))
    assert next(coming, None) is None, "a message is left over"
    return received, sizes


@settings(max_examples=60)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=12), st.integers(1, 400), st.integers(0, 99))
def test_tensors_arrive_as_they_were_sent(kinds, frame_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    sent = [
        (f"layer.{number}.weight", torch.randn(shape, generator=generator).to(dtype))
        for number, (shape, dtype) in enumerate(kinds)
    ]
    received, sizes = through(iter(sent), frame_bytes)
    assert [name for name, _ in received] == [name for name, _ in sent]
    for (_, got), (_, wanted) in zip(received, sent, strict=True):
        assert got.dtype == wanted.dtype
        assert got.shape == wanted.shape
        assert torch.equal(got, wanted)
        assert checksum(got) == checksum(wanted)
    largest = max([tensor.numel() * tensor.element_size() for _, tensor in sent], default=0)
    assert all(size <= max(frame_bytes + ALIGNMENT, largest) for size in sizes), "memory is bounded"


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_frame_is_full_to_the_byte(more):
    """Two tensors of 64 bytes in frames of 128, one less, one more."""
    sent = [(f"w{number}", torch.full((16,), float(number))) for number in range(4)]
    received, sizes = through(iter(sent), 128 + more)
    assert sizes == ([64] * 4 if more < 0 else [128, 128])
    assert all(torch.equal(got, wanted) for (_, got), (_, wanted) in zip(received, sent, strict=True))


def test_a_tensor_that_is_larger_than_a_frame_is_one_of_its_own_and_keeps_its_place():
    sent = [("a", torch.ones(2)), ("b", torch.arange(100.0).reshape(10, 10).T), ("c", torch.zeros(()))]
    received, sizes = through(iter(sent), 64)
    assert sizes == [16, 400, 16]
    assert [name for name, _ in received] == ["a", "b", "c"]
    assert torch.equal(received[1][1], sent[1][1]), "not contiguous where it was sent"


def test_what_was_received_stays_when_more_comes():
    """A server's layers keep tensors until they have all of theirs."""
    sent = [(f"w{number}", torch.full((8,), float(number))) for number in range(6)]
    received, _ = through(iter(sent), 32)
    assert [float(tensor[0]) for _, tensor in received] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_dtype_that_does_not_travel_is_refused_by_name():
    with pytest.raises(ValueError, match="w is int64; only float32, bfloat16, float16 travel"):
        list(frames([("w", torch.zeros(3, dtype=torch.int64))]))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"nonsense", "the header of a frame is not one"),
        (b'[["w", "float64", [2]]]', "the header of a frame is not one"),
        (b'[["w", "float32"]]', "the header of a frame is not one"),
        (b'[["w", "float32", [5]]]', "w ends at byte 20 of a payload of 16"),
    ],
)
def test_something_else_than_a_frame_is_refused(header, words):
    with pytest.raises(ValueError, match=words):
        list(tensors_of(Frame(header, torch.zeros(16, dtype=torch.uint8))))


def test_the_address_towards_this_machine_is_its_own():
    assert own_address("127.0.0.1") == "127.0.0.1"
