"""What does latent attention need beyond Megatron's own? Positions that are named, and gradients that are whole.

Megatron's `MLASelfAttention` makes queries, keys and values, rotates them and hands them to our core attention. Of it:
- its rotation is ours, which knows YaRN as config.json states it and the position of every token. While decoding it
  turns here, not in the core attention, which caches keys as they come: whole keys and values of each head.
- packed and context-parallel streams are kept from it: it takes any for Transformer Engine's layout. The positions
  come with the stream, and so with Megatron's recomputation.
- the down projections are on every rank, for the tokens that it has under sequence parallelism. Megatron's local ones
  are cut over tp and gathered, and their gradient through the rotated key, which all heads share, is one rank's heads'
  only: seen in 0.16.1 as a gradient norm that tp changes by 4 per cent.

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
    """x [s / tp, b, inputs] -> (x @ weight^T, None), the same weight [outputs, inputs] on every tensor-parallel rank.

    Under sequence parallelism each rank sees a part of the tokens, and Megatron sums the gradients over tp.
    """

    def __init__(self, config, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        setattr(self.weight, SEQUENCE_PARALLEL, config.sequence_parallel)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class LatentAttention(MLASelfAttention):
    """Built by Megatron's layer; `rotary_pos_emb` is set by the model, one for all its layers."""

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
        """The layer spec's classes as they are. Upstream: 0.19 refuses norms and no query latent without Transformer
        Engine. Remove once it takes the local spec as 0.16 does, which does not ask."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def get_query_key_value_tensors(
        self, hidden_states, key_value_states=None, position_ids=None, packed_seq_params=None, **options
    ):
        rotary = self.rotary_pos_emb
        positions = rotary.positions
        if packed_seq_params is not None:
            rotary.positions = packed_seq_params.positions
        try:
            return super().get_query_key_value_tensors(hidden_states, key_value_states, position_ids, None, **options)
        finally:
            rotary.positions = positions
