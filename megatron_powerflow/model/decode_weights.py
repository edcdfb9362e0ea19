"""In what order do weights lie in memory while responses are written?

On a CPU, in fp32, they lie transposed. A decoding pass multiplies a few dozen rows by every weight of the model, and so
reads each weight once from main memory. MKL does that faster from [in, out] than from PyTorch's [out, in]: with
SmolLM2-135M, 64 rows and one thread the products of a pass take 107 ms instead of 161. The copies stand in for the
parameters for as long as responses are written: Megatron's modules run as they are, whatever the layout, and the
parameters come back untouched.

Left out: GPUs, and bf16 on a CPU, which was not measured. Nothing is copied there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_powerflow.model.policy_model import PolicyModel

MIN_PASSES = 16  # fewer are not worth the copies, which cost what they save in about seven passes
LINE_NUMBERS = 16  # fp32 numbers of a cache line
BLOCK_ROWS = 256  # transposed at a time, so that they and their transpose stay in the cache


@contextlib.contextmanager
def decode_weights(chunks: Sequence[PolicyModel], num_passes: int) -> Iterator[None]:
    """Keep the matrices of `chunks` transposed in memory while open: same values and shapes, other strides and memory.

    num_passes: the forward passes to come; below MIN_PASSES nothing is done. The copies take as much memory as the
    matrices. Nothing may write to the parameters before the context closes: it would be lost.
    """
    originals = {}
    if num_passes >= MIN_PASSES:
        originals = {weight: weight.data for weight in _matrices(chunks)}
    try:
        for weight in originals:
            weight.data = transposed_in_memory(weight.data)
        yield
    finally:
        for weight, original in originals.items():
            weight.data = original


def transposed_in_memory(weight: Tensor) -> Tensor:
    """Copy a weight [out, in] so that its columns stand behind each other in memory. Returns the same shape.

    A column and its padding are an odd number of cache lines: with a multiple of 4 KiB, all numbers of a row would
    compete for the same few lines of the cache.
    """
    num_out, num_in = weight.shape
    lines = -(-num_out // LINE_NUMBERS)
    columns = weight.new_empty(num_in, LINE_NUMBERS * (lines + 1 - lines % 2))[:, :num_out]
    for first in range(0, num_out, BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        columns[:, rows] = weight[rows].t().contiguous()
    return columns.t()


def _matrices(chunks: Sequence[PolicyModel]) -> list[nn.Parameter]:
    """List the fp32 weights on the CPU that hidden states are multiplied by, each once, also if it is the embedding."""
    linear = (ColumnParallelLinear, RowParallelLinear)
    weights = [module.weight for chunk in chunks for module in chunk.modules() if isinstance(module, linear)]
    weights += [chunk.output_weight() for chunk in chunks if chunk.post_process]
    weights = [weight for weight in weights if weight is not None]
    return [weight for weight in dict.fromkeys(weights) if not weight.is_cuda and weight.dtype == torch.float32]
