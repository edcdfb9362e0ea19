"""In what order do weights lie in memory while responses are written? Transposed, on a CPU in fp32.

A decoding pass multiplies a few dozen rows by every weight of the model, and so reads each weight once from main
memory. MKL does that faster from [in, out] than from PyTorch's [out, in]: SmolLM2-135M with 64 rows on one thread, the
products of a pass in 107 ms instead of 161. The copies are the parameters for as long as responses are written:
Megatron's modules run as they are, whatever the layout, and the parameters come back untouched.

Left out: GPUs, and bf16 on a CPU, which was not measured. Nothing is copied there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_powerflow.model.policy_model import PolicyModel

WORTH_A_COPY = 16  # passes: the copies cost what they save in about seven
LINE = 16  # fp32 numbers of a cache line
BLOCK = 256  # rows transposed at a time: they and their transpose stay in the cache


@contextlib.contextmanager
def decode_weights(chunks: Sequence[PolicyModel], num_passes: int) -> Iterator[None]:
    """While open, the matrices of `chunks` lie transposed: same values, same shapes, other strides and memory.

    num_passes: forward passes to come; for few, nothing is done. Takes as much memory as the matrices, until closed.
    Nothing may write to the parameters meanwhile: it would be lost.
    """
    originals = {}
    if num_passes >= WORTH_A_COPY:
        originals = {weight: weight.data for weight in _matrices(chunks)}
    try:
        for weight in originals:
            weight.data = transposed_in_memory(weight.data)
        yield
    finally:
        for weight, original in originals.items():
            weight.data = original


def transposed_in_memory(weight: Tensor) -> Tensor:
    """[out, in] -> the same values and shape, column behind column.

    A column and its padding are an odd number of cache lines: with a multiple of 4 KiB, all numbers of a row would
    compete for the same few places of the cache.
    """
    num_out, num_in = weight.shape
    lines = -(-num_out // LINE)
    columns = weight.new_empty(num_in, LINE * (lines + 1 - lines % 2))[:, :num_out]
    for first in range(0, num_out, BLOCK):
        rows = slice(first, first + BLOCK)
        columns[:, rows] = weight[rows].t().contiguous()
    return columns.t()


def _matrices(chunks: Sequence[PolicyModel]) -> list[nn.Parameter]:
    """fp32 weights on the CPU that hidden states are multiplied by; one that is also the embedding comes once."""
    linear = (ColumnParallelLinear, RowParallelLinear)
    found = [module.weight for chunk in chunks for module in chunk.modules() if isinstance(module, linear)]
    found += [chunk.output_weight() for chunk in chunks if chunk.post_process]
    found = [weight for weight in found if weight is not None]
    return [weight for weight in dict.fromkeys(found) if not weight.is_cuda and weight.dtype == torch.float32]
