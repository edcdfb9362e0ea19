"""How does an `Architecture` become Megatron model chunks on this rank?

The layer spec is Transformer Engine's where that is importable, on CUDA, and has words for what the model does; else it
is Megatron's local spec with our SDPA core attention and norms. Nothing about a model is written down in this file:
every size comes from config.json.

Left out: which kernels are fused (`fused_kernels.py`) and which activations are recomputed (`recompute.py`).
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import ModelSection, PrecisionSection
from megatron_powerflow.model.attention import SdpaCoreAttention
from megatron_powerflow.model.fused_kernels import fused_kernels
from megatron_powerflow.model.latent_attention import LatentAttention
from megatron_powerflow.model.norm import KeyNormOverHeads, NormThenAdd, QueryNormOverHeads, RMSNorm
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import (
    needs_own_layers,
    params_dtype,
    transformer_config_fields,
    use_transformer_engine,
)
from megatron_powerflow.model.recompute import recompute_fields
from megatron_powerflow.parallel.layout import Layout, padded_vocab_size

# Architecture.activation -> the function of the gate's half of linear_fc1
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


def transformer_config(
    architecture: Architecture, layout: Layout, model: ModelSection, precision: PrecisionSection
) -> TransformerConfig:
    """Make Megatron's own config of this model under this layout.

    There is no dropout anywhere, so that a log-prob is a function of weights and tokens.
    """
    fused = torch.cuda.is_available() and use_transformer_engine(precision)
    window = architecture.sliding_window
    dense_ffn_hidden_size = architecture.experts.dense_ffn_hidden_size if architecture.experts else None
    config = (MLATransformerConfig if architecture.mla else TransformerConfig)(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=dense_ffn_hidden_size or architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_epsilon,
        layernorm_zero_centered_gamma=architecture.zero_centered_norms,
        qk_layernorm=architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[architecture.activation],
        softmax_scale=architecture.softmax_scale,
        window_size=None if window is None else (window - 1, 0),  # besides a token's own position: before, behind
        window_attn_skip_freq=architecture.windowed_layers
        and [int(windowed) for windowed in architecture.windowed_layers],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **_layout_fields(layout),
        moe_token_dispatcher_type="alltoall",  # read even without experts, and the default refuses variable lengths
        **_expert_fields(architecture, precision),
        **_latent_fields(architecture),
        # gradients are sums: the loss already carries 1 / rollouts of the global batch
        calculate_per_token_loss=True,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),  # `run.deterministic`
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every parameter is read from a file
        bias_dropout_fusion=fused and not architecture.post_norm,
        bias_activation_fusion=fused and architecture.activation == "silu",
        masked_softmax_fusion=False,
        **fused_kernels(architecture, precision, layout.cp)._asdict(),
        **recompute_fields(model, architecture),
        **transformer_config_fields(precision),
    )
    if architecture.rope.attention_factor != 1.0:
        # Megatron's attention multiplies cosines and sines by 1 + mscale / 10 * log(scaling_factor), if its config says
        # these words of yarn, over the same with mscale_all_dim. Nothing else reads them but its own yarn embedding.
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale, config.yarn_mscale_all_dim = 10.0 * (architecture.rope.attention_factor - 1.0), 0.0
    return config


def _layout_fields(layout: Layout) -> dict:
    """Return Megatron's fields for which rank holds what, and for how pipeline stages talk."""
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "pipeline_model_parallel_layout": _uneven_layers(layout),
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "sequence_parallel": layout.sequence_parallel,
        # micro-batches have lengths of their own and stages tell each other the shapes
        "variable_seq_lengths": layout.pp > 1 and layout.vpp is None,
        # Interleaving: with two stages the previous stage is the next one, and messages of a batch (activations,
        # gradients, shapes) are matched by their order, wrongly. Overlapped sends keep the directions apart; shapes
        # have no such path, so there all micro-batches are padded alike (`pack`).
        "overlap_p2p_comm": layout.vpp is not None,
        "batch_p2p_comm": layout.vpp is None,
    }


def _uneven_layers(layout: Layout) -> list[list[str]] | None:
    """Return Megatron's list of what each chunk holds, in model order; None where all have equally many layers."""
    if layout.layers is None:
        return None
    chunks = [["decoder"] * count for count in layout.layers]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _expert_fields(architecture: Architecture, precision: PrecisionSection) -> dict:
    """Return Megatron's fields for the mixture of experts. No token is dropped, and nothing is added to the loss to
    balance the experts."""
    experts = architecture.experts
    if experts is None:
        return {}
    first = experts.first_layer
    return {
        "num_moe_experts": experts.num,
        "moe_ffn_hidden_size": architecture.ffn_hidden_size,
        "moe_router_topk": experts.per_token,
        # softmax over all experts, then the choice; or the choice, then softmax over the chosen: the normalized weights
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_load_balancing_type": "none",
        # A choice between near-equal experts should not hang on rounding: bf16 products are summed in fp32. Of fp32
        # numbers Transformer Engine, where it is installed, multiplies in TF32 (log-probs off by 6e-4 on an H100);
        # Megatron asks it for nothing in fp64.
        "moe_router_dtype": "fp64" if params_dtype(precision) is torch.float32 else "fp32",
        "moe_router_score_function": experts.score,
        "moe_router_num_groups": experts.num_groups if experts.num_groups > 1 else None,
        "moe_router_group_topk": experts.groups_per_token if experts.num_groups > 1 else None,
        "moe_router_topk_scaling_factor": experts.scaling if experts.scaling != 1.0 else None,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        # where layers differ, checkpoints keep them apart, not as one tensor of all layers
        **({"moe_layer_freq": [int(i >= first) for i in range(architecture.num_layers)]} if first else {}),
    }


def _latent_fields(architecture: Architecture) -> dict:
    """Return Megatron's fields for latent attention."""
    latent, rope = architecture.mla, architecture.rope
    if latent is None:
        return {}
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.nope_head_dim,
        "qk_pos_emb_head_dim": latent.rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        # the angles come from our rotation; these two make the scale of attention scores
        "rope_type": "yarn",
        "rotary_scaling_factor": rope.factor,
        "mscale_all_dim": rope.mscale_all_dim,
    }


def build_chunks(
    config: TransformerConfig, architecture: Architecture, layout: Layout, precision: PrecisionSection, device
) -> list[PolicyModel]:
    """Build the model chunks of this rank on `device`: one, or vpp of them with an interleaved pipeline.

    The parameters are uninitialised; `load_from_hf` or a checkpoint fills them.
    """
    from megatron.core import parallel_state

    chunks = []
    for vp_stage in range(layout.num_chunks):
        stage = vp_stage if layout.vpp else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
        chunk = PolicyModel(
            architecture,
            padded_vocab_size(architecture, layout.tp),
            config=config,
            transformer_layer_spec=_block_spec(config, architecture, precision, stage),
            pre_process=first,
            post_process=last,
            vp_stage=stage,
        )
        _mark_tensor_parallel(chunk)
        if architecture.experts and architecture.experts.choice_bias:
            _add_choice_bias(chunk)
        chunks.append(chunk.to(device))
    return chunks


def _mark_tensor_parallel(chunk: PolicyModel) -> None:
    """Mark the weights that are shards: the gradient norm counts a replicated weight once, and a shard on its rank.

    Upstream: the marks are set by the random initialisation, which `perform_initialization=False` skips. Without them
    the gradient norm of tp > 1 misses every rank but the first. Remove when Megatron marks them always.
    """
    dimensions = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        dimension = dimensions.get(type(module))
        weight = getattr(module, "weight", None)
        if dimension is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dimension, stride=1)


def _add_choice_bias(chunk: PolicyModel) -> None:
    """Give each router an fp32 buffer that Megatron adds to the scores for the choice of experts and never changes.

    Megatron's own bias, of moe_router_enable_expert_bias, moves towards a balanced load with every step.
    """
    for module in chunk.modules():
        if isinstance(module, TopKRouter):
            del module.expert_bias
            module.register_buffer("expert_bias", torch.zeros(module.num_experts, dtype=torch.float32))


def _block_spec(config: TransformerConfig, architecture: Architecture, precision: PrecisionSection, vp_stage):
    """Return the layers of one chunk, Transformer Engine's or our own; the first ones are dense where experts begin
    later."""
    if use_transformer_engine(precision) and not needs_own_layers(architecture, config.context_parallel_size):
        from megatron_powerflow.model.te_attention import TENorm

        layer, norm = _te_layer(config, architecture), TENorm
    else:
        layer, norm = _own_layer(config, architecture, config.num_moe_experts), RMSNorm
    assert isinstance(layer, ModuleSpec)
    layers = [layer] * get_num_layers_to_build(config, vp_stage=vp_stage)
    if architecture.experts:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
        num_dense = min(max(architecture.experts.first_layer - offset, 0), len(layers))
        layers[:num_dense] = [_own_layer(config, architecture, None)] * num_dense
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _te_layer(config: TransformerConfig, architecture: Architecture) -> ModuleSpec:
    """Return Transformer Engine's layer with our attention over the KV cache."""
    from megatron_powerflow.model.te_attention import CachedTEAttention

    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=architecture.qk_norm,
    )
    layer.submodules.self_attention.submodules.core_attention = CachedTEAttention
    return layer


def _own_layer(config: TransformerConfig, architecture: Architecture, num_experts: int | None) -> ModuleSpec:
    """Return Megatron's local layer with our attention and norms. num_experts: None for one MLP."""
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=architecture.qk_norm,
        multi_latent_attention=architecture.mla is not None,
        normalization="RMSNorm",
    )
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if architecture.attention_softcap is not None:
        attention.core_attention = partial(SdpaCoreAttention, softcap=architecture.attention_softcap)
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm if architecture.pre_norm else IdentityOp
    if architecture.post_norm:
        size = {"config": config, "hidden_size": config.hidden_size}
        parts.self_attn_bda = parts.mlp_bda = ModuleSpec(module=NormThenAdd, params=size)
    if architecture.mla:
        parts.self_attention.module = LatentAttention
        attention.q_layernorm = attention.kv_layernorm = RMSNorm  # of the latents
    elif architecture.qk_norm_over_heads:
        attention.q_layernorm, attention.k_layernorm = QueryNormOverHeads, KeyNormOverHeads
    elif architecture.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
