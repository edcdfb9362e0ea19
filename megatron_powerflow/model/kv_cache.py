"""Where do the keys and values of half-written responses live?

There is one `KVCache` per model chunk and batch of rows. Tokens enter flat, as [t, 1, ...], with a row and a position
for each, so that prompts of different lengths need no padding and positions are the true ones, as in scoring.
A prompt's keys go to the rows of all its responses; a freed row takes another prompt's keys, and `select` drops the
rows that nobody wants.

On a GPU memory for all rows at their longest is taken at once, and stays where it is: growing would hold an old and a
new copy of a layer, and leave holes of all sizes behind. So what a round needs is known when it starts. Zeros are
written as far as attention sees, in steps: what the GPU held before may be NaN, which a mask does not hide. On a CPU,
where rows at their longest may take more than there is, memory grows in the same steps, layer by layer.

Left out: the attention over it (`attention.py`), who decides what is finished (`rollout/`), one copy of a prompt's keys
for all its responses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_powerflow.model.length_step import rounded_up
from megatron_powerflow.model.rotary import Rotation

GROWTH = 128  # positions filled with zeros, or added, at a time


class DecodingChunk(Protocol):
    """A model chunk that can be told to attend through a cache."""

    def set_decoding(self, positions: Tensor | None, cache: KVCache | None) -> None:
        """Attach a cache and the positions [t] int64 of the coming tokens; (None, None) detaches."""
        ...


class Segment(NamedTuple):
    """A prompt of a prefill pass. rows: int64, those that take its keys; start, stop: its tokens in the pass."""

    rows: Tensor
    start: int
    stop: int


class KeysAndValues(NamedTuple):
    """What a layer stores: each [rows, query_groups / tp, positions, head_dim], contiguous; with room to grow."""

    keys: Tensor
    values: Tensor


class KVCache:
    """The keys and values of the rows in the batch, for every layer of one chunk.

    layers: what each layer stores. lengths: [rows] int64 on the host, the tokens already stored.
    max_rows: the most rows that there are at a time. head_dims: those of a key and of a value. limit: the most tokens
    that a row can come to hold. length_step: the steps in which the lengths grow that attention sees
    (`length_step.py`). at_once: whether all memory is taken now; None: on a GPU. A forward pass is bracketed by
    `prefilling` or `decoding`, which say which tokens come.
    """

    def __init__(
        self,
        num_layers: int,
        max_rows: int,
        num_groups: int,
        head_dims: tuple[int, int],
        limit: int,
        dtype,
        device,
        *,
        length_step: int,
        at_once: bool | None = None,
    ) -> None:
        self._at_once = torch.device(device).type == "cuda" if at_once is None else at_once
        self._limit, self.dtype, self._device, self.length_step = limit, dtype, torch.device(device), length_step
        self._max_rows = max_rows
        rows, positions = self._room(0, 0)
        self.layers = [
            KeysAndValues(
                *(torch.empty(rows, num_groups, positions, size, dtype=dtype, device=device) for size in head_dims)
            )
            for _ in range(num_layers)
        ]
        self._filled = 0  # positions of every row that hold numbers
        self.lengths = np.zeros(0, dtype=np.int64)
        # The rest belongs to the forward pass under way.
        self.rotation: Rotation | None = None  # of the coming tokens; None: they come rotated
        self.segments: list[Segment] | None = None  # prefill: the prompts; None: decode
        self.max_length = 0  # decode: positions that attention is computed over, those that no row has yet masked
        # decode: [rows * groups] int64, index of each new key in the keys with their first three axes as one
        self.key_indices: Tensor | None = None
        self._ages: Tensor | None = None  # decode: [rows, max_length] positions since each key, the token's own 0
        self._masks: dict[int | None, Tensor] = {}  # by window, of this pass

    @property
    def num_rows(self) -> int:
        """The rows of the batch."""
        return len(self.lengths)

    @contextlib.contextmanager
    def prefilling(
        self, chunk: DecodingChunk, prompt_lengths: Sequence[int], rows: np.ndarray, padding: int
    ) -> Iterator[None]:
        """Bracket one forward pass of `chunk` over whole prompts, which stand behind each other.

        rows: [prompts, responses] int64, each prompt's rows, which forget what they hold. padding: the number of tokens
        behind the prompts, which are computed and stored nowhere.
        """
        self._fill(max(prompt_lengths))
        bounds = pairwise(np.cumsum([0, *prompt_lengths]).tolist())
        rows_on_device = torch.from_numpy(rows).to(self._device)
        self.segments = [Segment(rows_on_device[i], *bound) for i, bound in enumerate(bounds)]
        with self._attached(chunk, np.concatenate([np.arange(length) for length in prompt_lengths]), padding):
            yield
        self.lengths[rows] = np.array(prompt_lengths)[:, None]

    @contextlib.contextmanager
    def decoding(self, chunk: DecodingChunk, alive: np.ndarray, padding: int) -> Iterator[None]:
        """Bracket one forward pass of `chunk` with one token for each row.

        alive: [rows] bool; the other rows are computed and keep their length. padding: the number of tokens behind
        those of the rows, which are stored nowhere.
        """
        positions = np.where(alive, self.lengths, 0)
        self.max_length = min(rounded_up(int(positions.max()) + 1, self.length_step), self._limit)
        self._fill(self.max_length)
        keys, _ = self.layers[0]
        starts = torch.arange(self.num_rows * keys.shape[1], device=self._device) * keys.shape[2]
        on_device = torch.from_numpy(positions).to(self._device)
        self.key_indices = starts + on_device.repeat_interleave(keys.shape[1])
        self._ages = on_device[:, None] - torch.arange(self.max_length, device=self._device)
        self._masks, self.segments = {}, None
        with self._attached(chunk, positions, padding):
            yield
        self.lengths = self.lengths + alive

    def mask(self, window: int | None) -> Tensor:
        """Return the mask of a decoding pass, made once for all layers with the same window.

        window: the number of keys that a token sees, its own included; None: all before it. Returns
        [rows, 1, 1, max_length] of self.dtype, 0 where attended to, else -inf.
        """
        if window not in self._masks:
            assert self._ages is not None, "only in a pass of `decoding`"
            hidden = self._ages < 0
            if window is not None:
                hidden |= self._ages >= window
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self._device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]

    @contextlib.contextmanager
    def _attached(self, chunk: DecodingChunk, positions: np.ndarray, padding: int) -> Iterator[None]:
        """Keep the cache attached to the chunk while open. positions: [tokens] int64, without the padding."""
        chunk.set_decoding(torch.from_numpy(np.pad(positions, (0, padding))).to(self._device), self)
        try:
            yield
        finally:
            chunk.set_decoding(None, None)

    def add_rows(self, count: int) -> None:
        """Add `count` empty rows behind the others."""
        self.lengths = np.pad(self.lengths, (0, count))
        assert self.num_rows <= self._max_rows
        self._make_room()

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows only, in this order. rows: [kept] int64."""
        rows_on_device = torch.from_numpy(rows).to(self._device)
        for layer in self.layers:
            for stored in layer:
                filled = stored[:, :, : self._filled]
                filled[: len(rows)] = filled.index_select(0, rows_on_device)
        self.lengths = self.lengths[rows]

    def _fill(self, length: int) -> None:
        """Write zeros where attention over `length` positions will see, and nothing has been written yet."""
        if length <= self._filled:
            return
        start, self._filled = self._filled, min(rounded_up(length, GROWTH), self._limit)
        self._make_room()
        if not self._at_once:  # memory that is new holds zeros
            return
        for layer in self.layers:
            for stored in layer:
                stored[:, :, start : self._filled].zero_()

    def _room(self, rows: int, positions: int) -> tuple[int, int]:
        """Return the rows and positions that there is to be room for, where so many are in use."""
        return (self._max_rows, self._limit) if self._at_once else (rows, positions)

    def _make_room(self) -> None:
        """Replace what is too small, one layer after the other; the rows that are new hold zeros."""
        rows, positions = self._room(self.num_rows, self._filled)
        old_rows, _, old_positions, _ = self.layers[0].keys.shape
        if rows <= old_rows and positions <= old_positions:
            return
        size = max(rows, old_rows), max(positions, old_positions)
        for index, layer in enumerate(self.layers):
            self.layers[index] = KeysAndValues(*(_enlarged(stored, *size) for stored in layer))


def _enlarged(stored: Tensor, rows: int, positions: int) -> Tensor:
    """Copy keys or values into more memory, with zeros where there was none."""
    larger = stored.new_zeros(rows, stored.shape[1], positions, stored.shape[3])
    larger[: stored.shape[0], :, : stored.shape[2]] = stored
    return larger


class LayerCache(NamedTuple):
    """What a layer's core attention decodes through: the cache, and the layer's index in `KVCache.layers`."""

    cache: KVCache
    layer: int
