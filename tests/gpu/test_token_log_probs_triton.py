"""The Triton arithmetic of the log-prob kernel: sums and gradients equal to the plain one's in fp32 or wider.

On a GPU, or without one in Triton's interpreter:

    TRITON_INTERPRET=1 python -m pytest tests/gpu/test_token_log_probs_triton.py

Run on an H100 with triton 3.6.0, and in the interpreter with 3.2.0, 3.6.0 and 3.9.0.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist

import megatron_powerflow.log_probs.plain as plain
from megatron_powerflow.log_probs.kernel_choice import LogProbKernel, disagreement
from megatron_powerflow.log_probs.token_log_probs import token_statistics

pytest.importorskip("triton", reason="the package triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("no CUDA GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

import megatron_powerflow.log_probs.triton as in_triton  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
# the interpreter multiplies the bit patterns of bf16 (triton 3.9.0, interpreter.py: create_dot)
DTYPES = [dtype for dtype in in_triton.DTYPES if not (INTERPRETED and dtype is torch.bfloat16)]
# tokens, vocabulary, hidden: below, at and beyond the blocks' sizes
SIZES = [(7, 37, 16), (64, 128, 64), (130, 1000, 72)]


@pytest.fixture(scope="module")
def alone():
    """A process group of one."""
    dist.init_process_group("gloo" if INTERPRETED else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def case(num_tokens: int, vocab_size: int, hidden_size: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator).to(DEVICE, dtype)
    weight = (torch.randn(vocab_size, hidden_size, generator=generator) / 2).to(DEVICE, dtype)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator).to(DEVICE)
    return hidden, weight, targets


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (0.7, 3.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_it_agrees_with_the_plain_arithmetic(sizes, dtype, temperature, softcap):
    hidden, weight, targets = case(*sizes, dtype)
    for columns in (targets, targets - 5, targets + 5):  # targets of other ranks' rows among them
        assert disagreement(in_triton, hidden, weight, columns, temperature, softcap) <= 1.0


@pytest.mark.parametrize("everything", [False, True])
def test_sums_are_the_plain_ones(everything):
    hidden, weight, targets = case(70, 300, 100, torch.float32)
    for rows in (weight, weight[:0]):  # the latter: a rank that holds padding only
        arguments = (hidden, rows, targets, 0.7, everything, 1000)
        for ours, theirs in zip(in_triton.shard_sums(*arguments), plain.shard_sums(*arguments), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs_entropy_and_their_gradients_equal_full_logits_in_fp64(alone, dtype, softcap):
    """The padding would dominate if it took part."""
    hidden, weight, targets = case(70, 300, 96, dtype)
    padded = torch.cat([weight, torch.full_like(weight[:20], 50.0)])
    upstream = torch.linspace(-1.0, 1.0, 70, device=DEVICE)
    h, w = hidden.clone().requires_grad_(), padded.clone().requires_grad_()
    arguments = {"vocab_size": 300, "temperature": 0.7, "softcap": softcap, "max_logits": 5000}
    found = token_statistics(h, w, targets, tp_group=alone, arithmetic=in_triton, **arguments)
    (upstream @ found.log_probs + upstream.flip(0) @ found.entropy).backward()
    assert (w.grad[300:] == 0).all()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h64 @ w64.t()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    every = (logits / 0.7).log_softmax(-1)
    log_probs, entropy = every.gather(1, targets[:, None]).squeeze(1), -(every.exp() * every).sum(-1)
    (upstream.double() @ log_probs + upstream.flip(0).double() @ entropy).backward()
    torch.testing.assert_close(found.log_probs.double(), log_probs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    rounding = torch.finfo(dtype).eps + 1e-4
    for ours, theirs in ((h.grad, h64.grad), (w.grad[:300], w64.grad)):
        assert (ours.double() - theirs).norm() <= rounding * theirs.norm()


@pytest.mark.skipif(INTERPRETED, reason="chosen on CUDA only")
def test_it_is_chosen_on_cuda(alone):
    hidden, weight, targets = case(130, 1000, 72, torch.bfloat16)
    kernel = LogProbKernel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.log_probs(hidden, weight, targets, tp_group=alone, vocab_size=1000, temperature=1.0)
    assert kernel._settled is in_triton
