"""What does latent attention need beyond Megatron's own?

It needs the position of every token, and complete gradients. Megatron's `MLASelfAttention` makes queries, keys and
values, rotates them and hands them to our core attention. We change three things of it:
- The rotation is ours, which knows YaRN as config.json states it and the position of every token. While decoding, too,
  keys are rotated in this module and not in the core attention, which caches whole keys and values of each head.
- Packed and context-parallel streams are kept from Megatron's code, which takes every stream for Transformer Engine's
  layout. The positions come with the stream, and so with Megatron's recomputation.
- The down projections are whole on every rank and see its tokens under sequence parallelism. Megatron's local ones are
  cut over tp and gathered, and their gradient through the rotated key, which all heads share, covers one rank's heads
  only: in 0.16.1 tp changes the gradient norm by 4 per cent.

Left out: Transformer Engine's layers; a cache of latents, which is far smaller than one of keys and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from torch import Tensor, nn

from megatron_powerflow.model.norm import SEQUENCE_PARALLEL
from megatron_powerflow.model.rotary import LatentRotaryEmbedding


class ReplicatedLinear(nn.Module):
    """A linear layer whose weight [outputs, inputs] is the same on every tensor-parallel rank.

    forward: x [s / tp, b, inputs] -> (x @ weight^T, None), None in the place of Megatron's bias. Under sequence
    parallelism each rank sees a part of the tokens, and Megatron sums the gradients over tp_group.
    """

    def __init__(self, config, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        setattr(self.weight, SEQUENCE_PARALLEL, config.sequence_parallel)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class LatentAttention(MLASelfAttention):
    """Latent attention, built by Megatron's layer. `PolicyModel` sets `rotary_pos_emb`, one for all its layers."""

    rotary_pos_emb: LatentRotaryEmbedding

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        # without it the replicated weights' gradients would be each rank's own part, and nobody would sum them
        assert config.sequence_parallel or config.tensor_model_parallel_size == 1
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = ReplicatedLinear(config, config.hidden_size, config.q_lora_rank)
        self.linear_kv_down_proj = ReplicatedLinear(
            config, config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim
        )

    def _resolve_qk_norm_config(self, submodules) -> dict:
        """Return the layer spec's classes as they are.

        Upstream: 0.19 refuses norms, and a model without a query latent, where Transformer Engine is absent. Remove
        once it takes the local spec as 0.16 does, which does not call this method.
        """
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def get_query_key_value_tensors(
        self, hidden_states, key_value_states=None, position_ids=None, packed_seq_params=None, **options
    ):
        """Make queries, keys and values as Megatron does, with the positions of `packed_seq_params` where there are
        any."""
        rotary = self.rotary_pos_emb
        positions = rotary.positions
        if packed_seq_params is not None:
            rotary.positions = packed_seq_params.positions
        try:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, position_ids, None, **options)
        finally:
            rotary.positions = positions
