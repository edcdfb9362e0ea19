"""Which rotation does each position get? Rope as config.json states it, for any list of positions.

Extends Megatron's `RotaryEmbedding` in two ways: the frequencies come from the model's own `Rope` (Megatron
hard-codes Llama 3.1's constants), and the position of every token may be named: decoding, where each row is somewhere
else, needs that.
"""

from __future__ import annotations

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_powerflow.architecture import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """[rotated / 2] fp32: radians per position of each rotated pair, slowest last; rotated = rope.rotated(head_dim).

    llama3 scaling as in the Llama 3.1 release: wavelengths above original_max_positions / low_freq_factor are
    divided by `factor`, those below original_max_positions / high_freq_factor are kept, between: interpolated.
    longrope (arXiv 2402.13753): a factor for each, those for sequences of up to original_max_positions.
    """
    rotated = rope.rotated(head_dim)
    exponents = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / rotated
    frequencies = 1.0 / rope.theta**exponents
    if rope.scaling == "default":
        return frequencies
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "longrope":
        return frequencies / torch.tensor(rope.factors, device="cpu")
    if rope.scaling == "yarn":
        return _yarn_frequencies(frequencies, rope, head_dim)
    assert rope.scaling == "llama3", rope.scaling
    wavelengths = 2 * math.pi / frequencies
    smooth = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn_frequencies(frequencies: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """YaRN (arXiv 2309.00071): pairs that turn often in original_max_positions are kept, those that turn seldom are
    divided by `factor`, between: interpolated, over whole pairs."""

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(rope.beta_slow)), head_dim - 1)
    pairs = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    divided = ((pairs - first) / max(last - first, 0.001)).clamp(0.0, 1.0)
    return divided * frequencies / rope.factor + (1 - divided) * frequencies


class _RopeEmbedding(RotaryEmbedding):
    """`positions` None: positions 0..s-1, the same for each row. Else: the position of every token in turn.

    With positions [t] (int64) the angles are [t, 1, 1, rotated] fp32, whatever length is asked for; Megatron
    rotates so many dimensions of a head and passes the others through.
    """

    inv_freq: Tensor

    def __init__(self, rope: Rope, head_dim: int, **megatron_arguments) -> None:
        super().__init__(kv_channels=rope.rotated(head_dim), rotary_base=rope.theta, **megatron_arguments)
        self.inv_freq = inverse_frequencies(rope, head_dim).to(self.inv_freq.device)
        self.attention_factor = rope.attention_factor  # elsewhere than in decoding Megatron's attention applies it
        self.positions: Tensor | None = None

    def angles(self, max_seq_len: int, *args, **kwargs) -> Tensor:
        if self.positions is None:
            return super().forward(max_seq_len, *args, **kwargs)
        angles = self._angles(self.positions)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [t] int64 -> cosines and signed sines for `rotate`, each [t, 1, 1, rotated] in dtype."""
        angles = self._angles(positions)
        cosines, sines = (part.mul_(self.attention_factor).to(dtype) for part in (angles.cos(), angles.sin()))
        return (
            torch.cat((cosines, cosines), dim=-1)[:, None, None, :],
            torch.cat((-sines, sines), dim=-1)[:, None, None, :],
        )

    def _angles(self, positions: Tensor) -> Tensor:
        """[t, rotated / 2] fp32"""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        return torch.outer(positions.float(), self.inv_freq)


class PositionedRotaryEmbedding(_RopeEmbedding):
    """The angles. While `decoding` the answer is None, which Megatron's attention takes for "no rotation": the core
    attention then rotates by the cosines and sines of `rotation`, made once for all layers of a pass."""

    decoding = False

    def forward(self, max_seq_len: int, *args, **kwargs) -> Tensor | None:
        return None if self.decoding else self.angles(max_seq_len, *args, **kwargs)


class LatentRotaryEmbedding(_RopeEmbedding):
    """The same for Megatron's latent attention, which wants (angles, factor of cosines and sines) and rotates by them
    itself, while decoding as well."""

    def forward(self, max_seq_len: int, *args, **kwargs) -> tuple[Tensor, float]:
        return self.angles(max_seq_len, *args, **kwargs), self.attention_factor


def rotate(tensor: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """[t, 1, heads, head_dim], the first dimensions of each head rotated by the angles of each token, as many as there
    are: Megatron's formula, halves paired."""
    rotated = cosines.shape[-1]
    if rotated < tensor.shape[-1]:
        return torch.cat((rotate(tensor[..., :rotated], cosines, signed_sines), tensor[..., rotated:]), dim=-1)
    first, second = tensor.chunk(2, dim=-1)
    return tensor * cosines + torch.cat((second, first), dim=-1).mul_(signed_sines)
