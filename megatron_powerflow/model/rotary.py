"""Which rotation does each position get? That of the `Rope` which config.json states, for any list of positions.

Megatron's `RotaryEmbedding` is extended in two ways. The frequencies come from the model's own `Rope`, where Megatron
hard-codes Llama 3.1's constants. And the position of every token may be named, which decoding needs, where each row has
another length.

Left out: which rotation a config.json asks for (`hf/rope.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from megatron_powerflow.architecture import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Return the radians per position of each rotated pair, slowest last: [rope.rotated(head_dim) / 2] fp32, on CPU.

    llama3 scaling is that of the Llama 3.1 release: frequencies whose wavelength is above original_max_positions /
    low_freq_factor are divided by `factor`, those below original_max_positions / high_freq_factor are kept, and those
    between are interpolated. longrope (arXiv 2402.13753) divides each by its own number of `factors`, those for
    sequences of up to original_max_positions.
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
        return _yarn_frequencies(rope.theta**exponents, rope)
    assert rope.scaling == "llama3", rope.scaling
    wavelengths = 2 * math.pi / frequencies
    smooth = (rope.original_max_positions / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn_frequencies(wavelengths: Tensor, rope: Rope) -> Tensor:
    """Return the frequencies of pairs with wavelengths [pairs] fp32, in positions per radian, after YaRN (2309.00071).

    Those of pairs that turn often in original_max_positions are kept, those of pairs that turn seldom are divided by
    `factor`, and those between are interpolated. Where the range between is empty or reversed (beta_slow above
    beta_fast, or an original length that no pair turns in), the same formula holds, as in transformers and vLLM.
    """
    rotated = 2 * len(wavelengths)

    def pair_that_turns(times: float) -> float:
        return rotated * math.log(rope.original_max_positions / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.whole_pairs:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(len(wavelengths), dtype=torch.float32, device="cpu")
    kept = 1 - ((pairs - first) / (last - first)).clamp(0.0, 1.0)
    # in the order of transformers, to the bit: position 200,000 times a rounding of a frequency is a visible angle
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


class Rotation(NamedTuple):
    """What `rotate` multiplies by, each [t, 1, 1, rotated]. signed_sines: those of the first half are negative."""

    cosines: Tensor
    signed_sines: Tensor


class _RopeEmbedding(RotaryEmbedding):
    """The angles of positions, with the frequencies of a `Rope`.

    positions: None for 0, ..., s - 1, the same for each row; else [t] int64, the position of every token. Then the
    angles are [t, 1, 1, rotated] fp32, whatever length is asked for; Megatron rotates so many dimensions of a head and
    passes the others through.
    """

    inv_freq: Tensor

    def __init__(self, rope: Rope, head_dim: int, **megatron_arguments) -> None:
        super().__init__(kv_channels=rope.rotated(head_dim), rotary_base=rope.theta, **megatron_arguments)
        self.inv_freq = inverse_frequencies(rope, head_dim).to(self.inv_freq.device)
        self.attention_factor = rope.attention_factor  # elsewhere than in decoding Megatron's attention applies it
        self.positions: Tensor | None = None

    def angles(self, max_seq_len: int, *args, **kwargs) -> Tensor:
        """Return the angles in Megatron's layout: [max_seq_len or t, 1, 1, rotated] fp32."""
        if self.positions is None:
            return super().forward(max_seq_len, *args, **kwargs)
        angles = self._angles(self.positions)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Return what `rotate` needs for positions [t] int64, in dtype, times the attention factor."""
        angles = self._angles(positions)
        cosines, sines = (part.mul_(self.attention_factor).to(dtype) for part in (angles.cos(), angles.sin()))
        return Rotation(
            torch.cat((cosines, cosines), dim=-1)[:, None, None, :],
            torch.cat((-sines, sines), dim=-1)[:, None, None, :],
        )

    def _angles(self, positions: Tensor) -> Tensor:
        """Return the angle of each position and pair, [t, rotated / 2] fp32. Moves the frequencies to its device."""
        if self.inv_freq.device != positions.device:
            self.inv_freq = self.inv_freq.to(positions.device)
        return torch.outer(positions.float(), self.inv_freq)


class PositionedRotaryEmbedding(_RopeEmbedding):
    """The rotary embedding of every model without latent attention. forward returns the angles.

    While `decoding` it returns None, which Megatron's attention takes for "no rotation". The core attention then
    rotates by the cosines and sines of `rotation`, which are made once for all layers of a pass.
    """

    decoding = False

    def forward(self, max_seq_len: int, *args, **kwargs) -> Tensor | None:
        return None if self.decoding else self.angles(max_seq_len, *args, **kwargs)


class LatentRotaryEmbedding(_RopeEmbedding):
    """The rotary embedding of latent attention. forward returns (angles, factor of cosines and sines), by which
    Megatron's latent attention rotates itself, while decoding as well."""

    def forward(self, max_seq_len: int, *args, **kwargs) -> tuple[Tensor, float]:
        return self.angles(max_seq_len, *args, **kwargs), self.attention_factor


def rotate(tensor: Tensor, cosines: Tensor, signed_sines: Tensor) -> Tensor:
    """Rotate the first dimensions of each head, as many as cosines and signed_sines (of a `Rotation`) have.

    tensor: [t, 1, heads, head_dim]. Returns the same shape and dtype, new. The formula is Megatron's, which pairs
    dimension i with i + rotated / 2. With cosines and sines of a wider dtype it is rounded once, at the end.
    """
    rotated = cosines.shape[-1]
    if rotated < tensor.shape[-1]:
        return torch.cat((rotate(tensor[..., :rotated], cosines, signed_sines), tensor[..., rotated:]), dim=-1)
    first, second = tensor.chunk(2, dim=-1)
    return (tensor * cosines + torch.cat((second, first), dim=-1) * signed_sines).to(tensor.dtype)
