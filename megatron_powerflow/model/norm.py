"""Which RMS norms do layers have where Transformer Engine is absent, or lacks what the model does?

Megatron's own `WrappedTorchNorm` refuses sequence parallelism. Our `RMSNorm` marks its weight, so that Megatron sums
its gradient over the tensor-parallel ranks, each of which saw a part of the sequence. A norm can stand in two places:

    pre norm      x + block(norm(x))           where Megatron has input_layernorm and pre_mlp_layernorm
    post norm     x + norm(block(x))           `NormThenAdd`, in the place of Megatron's bias-dropout-add
    both          x + norm(block(norm(x)))
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from torch import Tensor, nn

# Megatron's mark of a parameter whose gradients it sums over tensor-parallel ranks
SEQUENCE_PARALLEL = "sequence_parallel"


class RMSNorm(nn.Module):
    """The RMS norm over the last dimension, y = x / sqrt(mean(x^2) + eps) * weight.

    The mean is taken in fp32, and y is of x's dtype and shape. With config.layernorm_zero_centered_gamma the factor is
    1 + weight, and the product is made in fp32, as in Gemma. Megatron's specs build it with (config, hidden_size, eps).
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, SEQUENCE_PARALLEL, config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float()
        scaled = scaled * torch.rsqrt(scaled.square().mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (scaled * (1.0 + self.weight.float())).to(x.dtype)
        return scaled.to(x.dtype) * self.weight


class NormThenAdd(nn.Module):
    """The norm behind a block: residual + norm(out), called as Megatron calls a bias-dropout-add.

    forward: (training, fused) -> a function of ((out, bias), residual, dropout). There is no bias and no dropout.
    """

    def __init__(self, config, hidden_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config, hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool):
        return self._add

    def _add(self, out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
        out, bias = out_with_bias
        assert bias is None and dropout == 0.0
        return residual + self.norm(out)


class _NormOverHeads(nn.Module):
    """The RMS norm of x [s, b, heads / tp, head_dim] over all heads of a token, those of the other ranks included.

    Every rank holds the whole weight [heads * head_dim] and uses its heads' part: the gradient is that part's and zeros
    elsewhere, and Megatron adds those of q_layernorm and k_layernorm up over tensor-parallel ranks
    (config.qk_layernorm). The sum of squares is added over the ranks, and so is its gradient, for each rank goes on
    with it differently. With more ranks than key heads several ranks have the same head, each with the gradient of its
    own queries, and each counts for its share in the sum of squares.
    """

    def __init__(self, config, num_heads: int, eps: float) -> None:
        super().__init__()
        assert config.qk_layernorm, "else the gradient of the weight is not added up"
        self.eps = eps
        self.num_copies = max(parallel_state.get_tensor_model_parallel_world_size() // num_heads, 1)  # of each head
        self.weight = nn.Parameter(torch.ones(num_heads * config.kv_channels, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float()
        squares = scaled.square().sum(dim=(-2, -1), keepdim=True) / self.num_copies
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        scaled = scaled * torch.rsqrt(squares / self.weight.numel() + self.eps)
        first = parallel_state.get_tensor_model_parallel_rank() // self.num_copies * x.shape[-2]
        weight = self.weight.unflatten(0, (-1, x.shape[-1]))[first : first + x.shape[-2]]
        return (scaled * weight).to(x.dtype)


class QueryNormOverHeads(_NormOverHeads):
    """The norm of queries over all heads; stands for q_layernorm, which Megatron builds with the size of one head."""

    def __init__(self, config, hidden_size: int, eps: float, **_) -> None:
        super().__init__(config, config.num_attention_heads, eps)


class KeyNormOverHeads(_NormOverHeads):
    """The norm of keys over all query groups; stands for k_layernorm."""

    def __init__(self, config, hidden_size: int, eps: float, **_) -> None:
        super().__init__(config, config.num_query_groups, eps)
