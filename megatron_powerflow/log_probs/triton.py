"""How is the arithmetic of `plain.py` done in Triton, on CUDA, without a tile of fp32 logits in memory?

    shard_sums    one program = BLOCK_TOKENS tokens x one part of the vocabulary: hidden W^T block by block in
                  registers, running max and sums; the parts are joined in torch. Nothing of size [tokens, vocabulary].
    grad_logits   one program = one block of the gradient: the logits again, turned into the gradient in registers,
                  written once in hidden's dtype. The caller's matrix products (cuBLAS) make the rest of it.

Products of bf16, fp16 or fp32 are added up in fp32 (fp32 in full precision, no TF32), and the logits are never rounded
to bf16, unlike the plain arithmetic's, so in bf16 the two differ by the rounding of the plain one.

The module is importable only where triton is; `kernel_choice.py` chooses it, and judges it by the plain arithmetic on
its first batch. It has run on an H100 with triton 3.6. Without a GPU two things were checked with triton 3.2 to 3.9
(capped logits: 3.6): values and gradients in fp32 and fp16 in Triton's interpreter (TRITON_INTERPRET=1, which cannot
multiply bf16), and that the kernels compile for sm_80, sm_90 and sm_100 in bf16 and fp32, with about 72 KiB of shared
memory. Block sizes are chosen by that memory, not by timing: at a hidden size of 8192 the plain arithmetic is the
faster one (benchmarks/README.md).

Left out: fp64 (the plain arithmetic has it), autotuning, a fused gradient of hidden and weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_powerflow.log_probs.tiles import from_another_maximum

FAILURES: tuple[type[Exception], ...] = (
    triton.CompilationError,
    triton.OutOfResources,
    RuntimeError,  # a pass of its compiler
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_TOKENS = 64
BLOCK_COLUMNS = 128
BLOCK_BYTES = 128  # of hidden's dtype, read per row and step of a product
PROGRAMS = 1024  # several for each multiprocessor of today's largest GPUs
LAUNCH = {"num_warps": 4, "num_stages": 3}


def shard_sums(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    temperature: float,
    everything: bool,
    max_logits: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `plain.shard_sums`. max_logits is not needed: logits stay in registers."""
    num_tokens, num_columns = hidden.shape[0], weight.shape[0]
    token_blocks, column_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS), triton.cdiv(num_columns, BLOCK_COLUMNS)
    if token_blocks * column_blocks == 0:
        lowest = torch.finfo(torch.float32).min
        maxima = hidden.new_full((num_tokens,), lowest, dtype=torch.float32)
        return maxima, maxima.new_zeros(4 if everything else 2, num_tokens)
    blocks_per_part = triton.cdiv(column_blocks, max(1, PROGRAMS // token_blocks))
    num_parts = triton.cdiv(column_blocks, blocks_per_part)
    partial = hidden.new_empty(5 if everything else 3, num_parts, num_tokens, dtype=torch.float32)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    _shard_sums[(token_blocks, num_parts)](
        hidden,
        weight,
        columns,
        partial,
        num_tokens,
        num_columns,
        num_parts,
        blocks_per_part,
        temperature,
        softcap or 1.0,
        HIDDEN=hidden.shape[1],
        CAPPED=softcap is not None,
        EVERYTHING=everything,
        **_blocks(hidden.dtype),
    )
    maxima = partial[0].amax(dim=0)
    return maxima, from_another_maximum(partial[1:], partial[0] - maxima).sum(dim=1)


def grad_logits(
    hidden: Tensor,
    weight: Tensor,
    temperature: float,
    columns: Tensor,
    log_normaliser: Tensor,
    grad: Tensor,
    grad_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Compute `plain.grad_logits`."""
    gradient = hidden.new_empty(hidden.shape[0], weight.shape[0])
    hidden, weight = hidden.contiguous(), weight.contiguous()
    entropy_arguments = (grad, grad)  # never read
    if grad_entropy is not None:
        assert entropy is not None, "entropy comes with grad_entropy"
        entropy_arguments = (grad_entropy, entropy)
    per_token = (columns, log_normaliser, grad, *entropy_arguments)
    grid = (triton.cdiv(hidden.shape[0], BLOCK_TOKENS), triton.cdiv(weight.shape[0], BLOCK_COLUMNS))
    _grad_logits[grid](
        hidden,
        weight,
        *(values.contiguous() for values in per_token),
        gradient,
        hidden.shape[0],
        weight.shape[0],
        temperature,
        softcap or 1.0,
        HIDDEN=hidden.shape[1],
        CAPPED=softcap is not None,
        ENTROPY=grad_entropy is not None,
        **_blocks(hidden.dtype),
    )
    return gradient


def _blocks(dtype: torch.dtype) -> dict[str, int]:
    """Return the block sizes and launch options of a kernel for hidden states of a dtype."""
    return {"TOKENS": BLOCK_TOKENS, "COLUMNS": BLOCK_COLUMNS, "INNER": BLOCK_BYTES // dtype.itemsize, **LAUNCH}


@triton.jit
def _logits(
    hidden,
    weight,
    rows,
    cols,
    num_tokens,
    num_columns,
    temperature,
    softcap,
    HIDDEN: tl.constexpr,
    CAPPED: tl.constexpr,
    INNER: tl.constexpr,
):
    """Return hidden @ weight^T, capped and divided by the temperature: [TOKENS, COLUMNS] fp32, 0 out of range."""
    sums = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    inner = tl.arange(0, INNER)
    # 64 bits: vocabulary times hidden size passes 2^31 in the largest models
    from_hidden = hidden + rows.to(tl.int64)[:, None] * HIDDEN
    from_weight = weight + cols.to(tl.int64)[:, None] * HIDDEN
    for start in range(0, HIDDEN, INNER):
        dims = start + inner[None, :]
        left = tl.load(from_hidden + dims, mask=(rows[:, None] < num_tokens) & (dims < HIDDEN), other=0.0)
        right = tl.load(from_weight + dims, mask=(cols[:, None] < num_columns) & (dims < HIDDEN), other=0.0)
        sums = tl.dot(left, tl.trans(right), sums, input_precision="ieee")
    if CAPPED:  # tanh(x) = 2 sigmoid(2 x) - 1
        sums = softcap * (2.0 * tl.sigmoid(2.0 * sums / softcap) - 1.0)
    return sums / temperature


@triton.jit
def _shard_sums(
    hidden,
    weight,
    columns,
    partial,  # written, [3 or 5, num_parts, num_tokens] fp32: of each part the max, then the sums of `shard_sums`
    num_tokens,
    num_columns,
    num_parts,
    blocks_per_part,
    temperature,
    softcap,
    HIDDEN: tl.constexpr,
    CAPPED: tl.constexpr,
    EVERYTHING: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    target = tl.load(columns + rows, mask=rows < num_tokens, other=-1)
    maximum = tl.full((TOKENS,), -3.4028234663852886e38, dtype=tl.float32)  # the lowest number: no difference is NaN
    mass = tl.zeros((TOKENS,), dtype=tl.float32)
    picked = tl.zeros((TOKENS,), dtype=tl.float32)
    weighted = tl.zeros((TOKENS,), dtype=tl.float32)
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    first = tl.program_id(1) * blocks_per_part * COLUMNS
    for block in range(0, blocks_per_part):
        cols = first + block * COLUMNS + tl.arange(0, COLUMNS)
        real = cols[None, :] < num_columns
        logits = _logits(
            hidden, weight, rows, cols, num_tokens, num_columns, temperature, softcap, HIDDEN, CAPPED, INNER
        )
        picked += tl.sum(tl.where((cols[None, :] == target[:, None]) & real, logits, 0.0), axis=1)
        above = tl.maximum(maximum, tl.max(tl.where(real, logits, -3.4028234663852886e38), axis=1))
        shift = maximum - above
        scale = tl.exp(shift)
        relative = logits - above[:, None]
        masses = tl.where(real, tl.exp(relative), 0.0)
        if EVERYTHING:
            weighted = (weighted + shift * mass) * scale + tl.sum(masses * relative, axis=1)
            total += tl.sum(logits, axis=1)  # columns out of range are 0
        mass = mass * scale + tl.sum(masses, axis=1)
        maximum = above
    out = partial + tl.program_id(1) * num_tokens + rows
    stride = num_parts * num_tokens
    valid = rows < num_tokens
    tl.store(out, maximum, mask=valid)
    tl.store(out + stride, mass, mask=valid)
    tl.store(out + 2 * stride, picked, mask=valid)
    if EVERYTHING:
        tl.store(out + 3 * stride, weighted, mask=valid)
        tl.store(out + 4 * stride, total, mask=valid)


@triton.jit
def _grad_logits(
    hidden,
    weight,
    columns,
    log_normaliser,
    grad,
    grad_entropy,
    entropy,
    gradient,  # [num_tokens, num_columns] in hidden's dtype
    num_tokens,
    num_columns,
    temperature,
    softcap,
    HIDDEN: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    rows = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = rows < num_tokens
    target = tl.load(columns + rows, mask=valid, other=-1)
    normaliser = tl.load(log_normaliser + rows, mask=valid, other=0.0)
    upstream = tl.load(grad + rows, mask=valid, other=0.0)
    logits = _logits(hidden, weight, rows, cols, num_tokens, num_columns, temperature, softcap, HIDDEN, CAPPED, INNER)
    log_p = logits - normaliser[:, None]
    slope = -upstream[:, None]  # d log p(target) / d logit_v = [v == target] - p(v)
    if ENTROPY:  # d entropy / d logit_v = -p(v) (log p(v) + entropy)
        upstream_entropy = tl.load(grad_entropy + rows, mask=valid, other=0.0)
        nats = tl.load(entropy + rows, mask=valid, other=0.0)
        slope = slope - upstream_entropy[:, None] * (log_p + nats[:, None])
    slopes = tl.exp(log_p) * slope + tl.where(cols[None, :] == target[:, None], upstream[:, None], 0.0)
    if CAPPED:  # d cap tanh(z / cap) / dz = 1 - tanh(z / cap)^2
        tanh = logits * temperature / softcap
        slopes = slopes * (1.0 - tanh * tanh)
    out = gradient + rows.to(tl.int64)[:, None] * num_columns + cols[None, :]
    inside = valid[:, None] & (cols[None, :] < num_columns)
    tl.store(out, (slopes / temperature).to(gradient.dtype.element_ty), mask=inside)
