"""Qwen3 mixture of experts: Qwen3's attention, and in each layer a router and experts in the place of the MLP.

Oddities: norm_topk_prob decides whether the weights of the chosen experts add up to 1 (true in the released models,
false where the file is silent); an expert's width is moe_intermediate_size; transformers 5 writes the number of experts
as num_local_experts; head_dim is hidden_size / heads where the file is silent, unlike the dense Qwen3. Layers with an
ordinary MLP in between (decoder_sparse_step, mlp_only_layers), which no released model has, are refused.
router_aux_loss_coef and output_router_logits add to transformers' own training loss: PowerFlow adds no auxiliary loss,
so they change nothing.
"""

from megatron_powerflow.architecture import Experts
from megatron_powerflow.hf.families import qwen3
from megatron_powerflow.hf.families.llama import DEFAULTS, MODEL_OPS
from megatron_powerflow.hf.families.mixtral import expert_ops
from megatron_powerflow.hf.family import Family

FAMILY = Family(
    model_type="qwen3_moe",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    must_be={
        "hidden_act": "silu",
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    reads=("sliding_window",),  # counts only with use_sliding_window
    synonyms={"num_local_experts": "num_experts"},
    sizes=("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    overrides=lambda fields: {
        "qk_norm": True,
        "ffn_hidden_size": fields["moe_intermediate_size"],
        "experts": Experts(
            fields["num_experts"],
            fields["num_experts_per_tok"],
            bool(fields["norm_topk_prob"]),
        ),
    },
    layer_ops=(*expert_ops("mlp", "gate_proj", "up_proj", "down_proj"), *qwen3.NORMS),
    model_ops=MODEL_OPS,
)
