"""From what are the products of weights made while responses are written?

A decoding pass multiplies a few dozen rows by every weight of the model. On a CPU each weight therefore has a copy for
as long as responses are written, laid out as the processor's fastest product reads it:

    packed       in the blocks of oneDNN's kernels. SmolLM2-135M, 64 rows, one core of an AMD EPYC with AVX-512: the
                 products of a pass take 167 ms in fp32 and 87 ms in bf16, instead of 233 and 106 from PyTorch's
                 [out, in]; with 8 rows 40 and 21 instead of 74 and 38.
    transposed   [in, out], for MKL in fp32 where it runs on its own maker's processors: 107 ms instead of 161 on an
                 Intel Xeon. Packed was not measured there. On AMD transposing saves 4 per cent.

A `DecodeWeight` with the copy stands in for the parameter. Megatron's modules run as they are, whatever the layout: a
product finds the copy, and all else, an embedding of tied weights for one, finds the parameter's numbers.

Left out: GPUs, and the grouped weights of Megatron's experts. Nothing is copied there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from megatron_powerflow.model.latent_attention import ReplicatedLinear
from megatron_powerflow.model.policy_model import PolicyModel

MIN_PASSES = 16  # fewer are not worth the copies, which cost what they save in about seven passes
PACKED_FOR_ROWS = 64  # oneDNN's blocks are the same for any number of rows from 16 on, and serve fewer as well
LINE_NUMBERS = 16  # fp32 numbers of a cache line
BLOCK_ROWS = 256  # transposed at a time, so that they and their transpose stay in the cache


@contextlib.contextmanager
def decode_weights(chunks: Sequence[PolicyModel], num_passes: int) -> Iterator[None]:
    """Let the products of `chunks` be made of copies of their matrices while open; the parameters stay as they are.

    num_passes: the forward passes to come; below MIN_PASSES nothing is done. The copies take as much memory as the
    matrices. What is written to the parameters before the context closes reaches no product.
    """
    stand_ins = {}
    if num_passes >= MIN_PASSES:
        stand_ins = {weight: decode_weight(weight.data) for weight in matrices(chunks) if is_copied(weight)}
    places = [
        (module, name, weight)
        for chunk in chunks
        for module in chunk.modules()
        for name, weight in module.named_parameters(recurse=False)
        if weight in stand_ins
    ]
    try:
        for module, name, weight in places:
            module._parameters[name] = stand_ins[weight]  # keeps its place among the module's parameters
        yield
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


class DecodeWeight(Tensor):
    """A weight [out, in] that is multiplied by rows from a copy: `rows @ weight.t()`, or `F.linear`.

    copy: [out, in] in oneDNN's blocks or [in, out]. turned: the same weight transposed, [in, out], of this class as
    well. Whatever else is done to either is done to the numbers it was made of.
    """

    copy: Tensor
    turned: DecodeWeight | None  # None: this is the transpose

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), named=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function is Tensor.t and arguments[0].turned is not None:
                return arguments[0].turned
            if function in PRODUCTS and type(arguments[1]) is cls:
                rows, weight, *bias = arguments
                if (weight.turned is None) != (function is F.linear) and rows.dtype == weight.dtype:
                    return _product(rows, weight.copy, *bias, **(named or {}))
            return function(*arguments, **(named or {}))


PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, F.linear)


def decode_weight(weight: Tensor, *, packed: bool | None = None) -> DecodeWeight:
    """Make the stand-in of a weight [out, in] on the CPU, in fp32 or bf16, with a new copy of it.

    packed: whether the copy is; None: unless the weight is of fp32 and MKL runs on its own maker's processor. A weight
    on `meta`, where a rehearsal counts bytes, has a copy of as many.
    """
    if packed is None:
        packed = weight.dtype != torch.float32 or not at_home_in_mkl()
    stand_in, turned = weight.as_subclass(DecodeWeight), weight.t().as_subclass(DecodeWeight)
    if weight.is_meta:
        stand_in.copy = torch.empty_like(weight).t()
    elif not packed:
        stand_in.copy = transposed_in_memory(weight).t()
    else:
        stand_in.copy = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
    stand_in.turned, turned.turned, turned.copy = turned, None, stand_in.copy
    return stand_in


def _product(rows: Tensor, copy: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return rows @ weight^T + bias. rows: [..., in] of the weight's dtype; copy: of a `DecodeWeight`."""
    if copy.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(rows, copy, bias, "none", [], "")
    return rows @ copy if bias is None else rows @ copy + bias


@cache
def at_home_in_mkl() -> bool:
    """Whether this processor is Intel's, for which MKL has kernels of its own."""
    cpu_info = Path("/proc/cpuinfo")
    return torch.backends.mkl.is_available() and cpu_info.exists() and "GenuineIntel" in cpu_info.read_text()


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


def matrices(chunks: Sequence[PolicyModel]) -> list[nn.Parameter]:
    """List the weights that hidden states are multiplied by, each once, that of the output layer last."""
    linear = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
    outputs = [chunk.output_weight() for chunk in chunks if chunk.post_process]
    weights = [module.weight for chunk in chunks for module in chunk.modules() if isinstance(module, linear)]
    layers = [weight for weight in weights if weight is not None and all(weight is not output for output in outputs)]
    return list(dict.fromkeys(layers + outputs))


def is_copied(weight: Tensor) -> bool:
    """Whether a product with this weight is faster from a copy: on a CPU in fp32, and in bf16 where it has that."""
    if weight.is_cuda or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
