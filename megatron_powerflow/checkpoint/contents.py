"""What do a checkpoint's tensors hold, in a few digits that do not depend on the layout?

Of every element: its bits as an integer, times an odd number that is made of its tensor's name and of its place in the
whole tensor; summed modulo 2^64. Integers add up the same in any order, so ranks that hold other shares of the same
tensors come to the same sum; an element that is changed, lost, doubled or in another place changes it.

Left out: communication; the files' digests (`digests.py`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

PIECE = 2**18  # elements at a time: the integers made of them stay in the cache
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, as splitmix64 steps
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's part of a tensor. data: any float. global_shape, offset: of the whole tensor, and where the part begins
    in it; they may have leading axes, such as a layer's number, that data has not."""

    name: str
    data: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sums:
    """weights, masters, moments: sums over the pieces of a kind, or over ranks. num_masters: elements that have a main
    copy. is_finite: whether all weights are."""

    weights: int = 0
    masters: int = 0
    moments: int = 0
    num_masters: int = 0
    is_finite: bool = True

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            (self.weights + other.weights) & MASK,
            (self.masters + other.masters) & MASK,
            (self.moments + other.moments) & MASK,
            self.num_masters + other.num_masters,
            self.is_finite and other.is_finite,
        )


def sums_of(pieces: Iterable[Piece]) -> Sums:
    """Return the sums over this rank's pieces. A kind is told by the name that Megatron gives: see `_kind`."""
    total = Sums()
    for piece in pieces:
        kind, name = _kind(piece.name)
        value = sum_of(replace(piece, name=name))
        if kind == "weights":
            total += Sums(weights=value, is_finite=is_finite(piece.data))
        elif kind == "masters":
            total += Sums(masters=value, num_masters=piece.data.numel())
        else:
            total += Sums(moments=value)
    return total


def sum_of(piece: Piece) -> int:
    """Return the sum of one piece, 0 <= sum < 2^64."""
    seed = int.from_bytes(hashlib.sha256(piece.name.encode()).digest()[:8], "little")
    starts, length = _rows(piece)
    flat = piece.data.detach().contiguous()
    bits, total = flat.view(-1).view(INTEGERS[flat.element_size()]).view(len(starts), length), 0
    rows, starts = max(1, PIECE // max(1, length)), starts.to(bits.device)
    for row in range(0, len(starts), rows):
        for at in range(0, length, PIECE):
            part = bits[row : row + rows, at : at + PIECE].long()
            factors = starts[row : row + rows, None] + torch.arange(at, at + part.shape[1], device=bits.device)
            factors = factors.mul_(_signed(GOLDEN)).add_(_signed(seed)).bitwise_or_(1)
            total += int(part.mul_(factors).sum())
    return total & MASK


def is_finite(data: Tensor) -> bool:
    """Return whether all elements are: a sum is finite only then, but for an overflow, which is looked into."""
    return bool(torch.isfinite(data.sum(dtype=torch.float32))) or bool(torch.isfinite(data).all())


def _rows(piece: Piece) -> tuple[Tensor, int]:
    """The part as rows of elements that lie together in the whole tensor: where each begins there, and their length."""
    shape, whole = tuple(piece.data.shape), piece.global_shape
    leading = len(whole) - len(shape)
    strides = [1] * len(whole)
    for axis in range(len(whole) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * whole[axis + 1]
    axis = max(0, len(shape) - 1)  # the first of those that lie together: all axes behind it are held whole
    while axis > 0 and shape[axis] == whole[leading + axis]:
        axis -= 1
    starts = torch.tensor([sum(at * stride for at, stride in zip(piece.offset, strides, strict=True))])
    for number, extent in enumerate(shape[:axis]):
        starts = (starts[:, None] + torch.arange(extent) * strides[leading + number]).view(-1)
    return starts, math.prod(shape[axis:])


def _kind(name: str) -> tuple[str, str]:
    """(weights, masters or moments; the name that counts). `optimizer.state.fp32_param.X` and, of the distributed
    optimizer, `optimizer.state.param.X` are main copies, other things of the optimizer its moments, the rest the
    model's."""
    if not name.startswith("optimizer."):
        return "weights", name
    for prefix in ("optimizer.state.fp32_param.", "optimizer.state.param."):
        if name.startswith(prefix):
            return "masters", name.removeprefix(prefix)
    return "moments", name


def _signed(number: int) -> int:
    """The same 64 bits as torch's int64 has them."""
    return number - 2**64 if number >= 2**63 else number
