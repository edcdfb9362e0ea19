"""Where do the keys and values of half-written responses live?

One `KVCache` per model chunk and batch of rows. Tokens enter flat: [t, 1, ...] with a row and a position for
each, so that prompts of different lengths need no padding and positions are the true ones, as in scoring.
Room grows in steps; a prompt's keys go to the rows of all its responses, a freed row takes another prompt's, and rows
that nobody wants are dropped by `select`.

Left out: the attention over it (`attention.py`), who decides what is finished (`rollout/`), one copy of a prompt's keys
for all its responses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

GROWTH = 128  # positions added at a time


class DecodingChunk(Protocol):
    """A model chunk that can be told to attend through a cache."""

    def set_decoding(self, positions: Tensor | None, cache: KVCache | None) -> None: ...


class Segment(NamedTuple):
    """A prompt: the rows that it goes to, and where its tokens start and stop among those of the pass."""

    rows: Tensor
    start: int
    stop: int


class KVCache:
    """Keys and values of the rows in the batch, for every layer of one chunk.

    layers: (keys, values) of each layer, each [rows, query_groups / tp, capacity, head_dim], contiguous.
    head_dims: of a key and of a value.
    limit: tokens that a row can come to hold; room never grows beyond it.
    lengths: [rows] int64 on the host, tokens already stored. A forward pass is bracketed by `prefilling` or `decoding`,
    which say which tokens come.
    """

    def __init__(self, num_layers: int, num_groups: int, head_dims: tuple[int, int], limit: int, dtype, device) -> None:
        keys, values = (torch.empty(0, num_groups, 0, size, dtype=dtype, device=device) for size in head_dims)
        self.layers: list[tuple[Tensor, Tensor]] = [(keys, values)] * num_layers
        self.lengths = np.zeros(0, dtype=np.int64)
        self._limit, self.dtype, self._device = limit, dtype, device
        # of the forward pass under way:
        # cosines and sines of the coming tokens, see rotary.py; None: they come rotated
        self.rotation: tuple[Tensor, Tensor] | None = None
        self.segments: list[Segment] | None = None  # prefill: the prompts; None: decode
        self.max_length = 0  # decode: positions that any row attends to
        self.places: Tensor | None = None  # decode: [rows * groups] where the new keys go, the first three axes as one
        self._ages: Tensor | None = None  # decode: [rows, max_length] positions since each key, the token's own 0
        self._masks: dict[int | None, Tensor] = {}  # by window, of this pass

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @contextlib.contextmanager
    def prefilling(
        self, chunk: DecodingChunk, prompt_lengths: Sequence[int], rows: np.ndarray, padding: int
    ) -> Iterator[None]:
        """One forward pass over whole prompts, one behind the other.

        rows: [prompts, responses] each prompt's rows, which forget what they hold. padding: tokens behind the prompts,
        which are computed and stored nowhere.
        """
        self._reserve(max(prompt_lengths))
        bounds = pairwise(np.cumsum([0, *prompt_lengths]).tolist())
        places = torch.from_numpy(rows).to(self._device)
        self.segments = [Segment(places[i], *bound) for i, bound in enumerate(bounds)]
        with self._attached(chunk, np.concatenate([np.arange(length) for length in prompt_lengths]), padding):
            yield
        self.lengths[rows] = np.array(prompt_lengths)[:, None]

    @contextlib.contextmanager
    def decoding(self, chunk: DecodingChunk, alive: np.ndarray, padding: int) -> Iterator[None]:
        """One forward pass with one token for each row. alive: [rows] bool; other rows are computed and stay as they
        are. padding: tokens behind those, stored nowhere."""
        positions = np.where(alive, self.lengths, 0)
        self.max_length = self._attended(int(positions.max()) + 1)
        self._reserve(self.max_length)
        keys, _ = self.layers[0]
        starts = torch.arange(keys.shape[0] * keys.shape[1], device=self._device) * keys.shape[2]
        on_device = torch.from_numpy(positions).to(self._device)
        self.places = starts + on_device.repeat_interleave(keys.shape[1])
        self._ages = on_device[:, None] - torch.arange(self.max_length, device=self._device)
        self._masks, self.segments = {}, None
        with self._attached(chunk, positions, padding):
            yield
        self.lengths = self.lengths + alive

    def _attended(self, length: int) -> int:
        """Positions that attention is computed over, of rows of `length` tokens at most.

        On CUDA in steps of GROWTH, the rest masked: cuDNN makes a plan for every new length, some 0.1 s for a model
        of 24 layers on an H100, which would be paid for every token.
        """
        if self._device.type != "cuda":
            return length
        return min(-(-length // GROWTH) * GROWTH, self._limit)

    def mask(self, window: int | None) -> Tensor:
        """decode: [rows, 1, 1, max_length] of self.dtype, 0 where attended to, else -inf. window: keys that a token
        sees, its own included; None: all before it. Made once a pass for all layers."""
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
        chunk.set_decoding(torch.from_numpy(np.pad(positions, (0, padding))).to(self._device), self)
        try:
            yield
        finally:
            chunk.set_decoding(None, None)

    def add_rows(self, count: int) -> None:
        """Empty rows behind the others."""
        self._replace(lambda tensor: torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]))
        self.lengths = np.pad(self.lengths, (0, count))

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows only, in this order."""
        places = torch.from_numpy(rows).to(self._device)
        self._replace(lambda tensor: tensor.index_select(0, places))
        self.lengths = self.lengths[rows]

    def _reserve(self, length: int) -> None:
        capacity = self.layers[0][0].shape[2]
        if length <= capacity:
            return
        extra = min(-(-length // GROWTH) * GROWTH, self._limit) - capacity
        self._replace(
            lambda tensor: torch.cat([tensor, tensor.new_zeros(*tensor.shape[:2], extra, tensor.shape[3])], dim=2)
        )

    def _replace(self, made_of: Callable[[Tensor], Tensor]) -> None:
        """Keys and values by what is made of them, one layer after the other."""
        for place, (keys, values) in enumerate(self.layers):
            self.layers[place] = made_of(keys), made_of(values)
