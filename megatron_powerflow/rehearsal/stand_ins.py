"""What stands for the kernels that a GPU has and `meta` has not? Functions that keep what the kernels keep.

torch's attention without a GPU would build all scores, and our RMS norm is written out in fp32. In a rehearsal an
attention keeps queries, keys, values, its output and a number per query, as every fused attention does, and a norm
keeps its input and a number per token, as Transformer Engine's does.

Left out: numbers. What a kernel needs for itself is not known here (cuBLAS and cuDNN workspaces).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatron_powerflow.model.attention import SdpaCoreAttention
from megatron_powerflow.model.norm import RMSNorm


class FusedAttention(TorchFunctionMode):
    """While active, torch's scaled_dot_product_attention is one that never holds the scores."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return function(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        normalisers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normalisers)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class FusedNorm(RMSNorm):
    """The RMS norm as one kernel computes it: nothing of fp32 but a number per token is kept or made."""

    def forward(self, x: Tensor) -> Tensor:
        return _Norm.apply(x, self.weight)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FusedCoreAttention(SdpaCoreAttention):
    """The core attention as Transformer Engine computes it: a key is not repeated for the heads of its group, and
    packed sequences go through one kernel."""

    def forward(self, query, key, value, *arguments, **named):
        if self.kv_cache is not None:
            return super().forward(query, key, value, *arguments, **named)
        return _Attention.apply(query, key, value).flatten(2)


def stand_in_for_transformer_engine(chunks: Sequence[nn.Module]) -> None:
    """Let norms and core attentions of the chunks keep what Transformer Engine's keep."""
    for chunk in chunks:
        for module in chunk.modules():
            if stand_in := {RMSNorm: FusedNorm, SdpaCoreAttention: FusedCoreAttention}.get(type(module)):
                module.__class__ = stand_in
