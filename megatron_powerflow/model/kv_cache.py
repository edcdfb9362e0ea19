"""Where do the keys and values of half-written responses live?

One `KVCache` per model chunk and batch of rows. Tokens enter flat: [t, 1, ...] with a row and a position for
each, so that prompts of different lengths need no padding and positions are the true ones, as in scoring.
Room grows in steps; finished rows are dropped by `select`, responses of a prompt share its prefill by `repeat`.

Left out: the attention over it (`attention.py`), who decides what is finished (`rollout/`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

GROWTH = 128  # positions added at a time


class LayerCache:
    """One layer's keys and values, each [rows, query_groups / tp, capacity, head_dim]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class KVCache:
    """Keys and values of `num_rows` rows for every layer of one chunk.

    limit: tokens that a row can come to hold; room never grows beyond it.
    lengths: [rows] int64 on the device, tokens already stored. A forward pass is bracketed by `entering`,
    which says which tokens come; the attention layers read `segments` (prefill) or `mask` (decode).
    """

    def __init__(
        self, num_layers: int, num_rows: int, num_groups: int, head_dim: int, limit: int, dtype, device
    ) -> None:
        empty = torch.empty(num_rows, num_groups, 0, head_dim, dtype=dtype, device=device)
        self.layers = [LayerCache(empty, empty) for _ in range(num_layers)]
        self._limit = limit
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.max_length = 0  # of any row; kept on the host, so that nobody waits for the device
        # of the forward pass under way:
        self.segments: list[tuple[int, int]] | None = None  # (start, stop) of each row's tokens: prefill
        self.mask: Tensor | None = None  # [rows, 1, 1, max_length] bool, True: may be attended to: decode

    @property
    def num_rows(self) -> int:
        return self.lengths.shape[0]

    @contextlib.contextmanager
    def entering(self, chunk: nn.Module, prompt_lengths: Sequence[int] | None, padding: int) -> Iterator[None]:
        """Attach to `chunk` for one forward pass and count its tokens afterwards.

        prompt_lengths: tokens of each row, in order, rows being empty (prefill); None: one token per row.
        padding: tokens behind those, which are computed and stored nowhere.
        """
        device = self.lengths.device
        if prompt_lengths is not None:
            assert self.max_length == 0, "prefill into rows that hold tokens already"
            stops = torch.tensor([0, *prompt_lengths]).cumsum(0).tolist()
            self.segments, self.mask = list(pairwise(stops)), None
            positions = torch.cat([torch.arange(length, device=device) for length in prompt_lengths])
            added = torch.tensor(list(prompt_lengths), device=device)
            self.max_length = max(prompt_lengths)
        else:
            self.max_length += 1
            self.segments = None
            positions = self.lengths
            added = torch.ones_like(self.lengths)
            columns = torch.arange(self.max_length, device=device)
            self.mask = (columns <= self.lengths[:, None])[:, None, None, :]
        self._reserve(self.max_length)
        chunk.set_decoding(torch.cat([positions, positions.new_zeros(padding)]), self)
        try:
            yield
        finally:
            chunk.set_decoding(None, None)
        self.lengths = self.lengths + added

    def select(self, rows: Tensor) -> None:
        """Keep these rows only, in this order."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
        self.lengths = self.lengths.index_select(0, rows)

    def repeat(self, times: int) -> None:
        """Each row `times` times in succession: the responses of a prompt behind one prefill."""
        if times > 1:
            self.select(torch.arange(self.num_rows, device=self.lengths.device).repeat_interleave(times))

    def _reserve(self, length: int) -> None:
        capacity = self.layers[0].keys.shape[2]
        if length <= capacity:
            return
        extra = min(-(-length // GROWTH) * GROWTH, self._limit) - capacity
        for layer in self.layers:
            room = layer.keys.new_zeros(*layer.keys.shape[:2], extra, layer.keys.shape[3])
            layer.keys = torch.cat([layer.keys, room], dim=2)
            layer.values = torch.cat([layer.values, room], dim=2)
