"""Mixtral: Mistral's attention, and in each layer a router and experts in the place of the MLP.

Oddities: the experts' tensors are called w1 (gate), w3 (up) and w2 (down); rope theta is 1e6 where the file is silent;
the router's softmax is over the chosen experts only, whatever the file says. Rope scaling `yarn` is refused, because
transformers (5.23) fails to load it where the file has no head_dim, as no released file has. router_aux_loss_coef and
output_router_logits add to transformers' own training loss: PowerFlow adds no auxiliary loss, so they change nothing.
"""

from megatron_powerflow.architecture import Experts
from megatron_powerflow.hf.families.llama import DEFAULTS, LAYER_OPS, MODEL_OPS
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import GateUp, Op, Replicated, Rows


def expert_ops(block: str, gate: str, up: str, down: str) -> tuple[Op, ...]:
    """Return the operations of Llama's layer with a router and experts in the place of its MLP.

    block: the mixture's name below model.layers.{layer}; gate, up, down: names of an expert's weights, less .weight.
    """
    expert = f"model.layers.{{layer}}.{block}.experts.{{expert}}."
    local = "mlp.experts.local_experts.{expert}."
    return (
        *(op for op in LAYER_OPS if not op.megatron.startswith("mlp.")),
        Replicated("mlp.router.weight", f"model.layers.{{layer}}.{block}.gate.weight", rows="experts"),
        GateUp(local + "linear_fc1.weight", f"{expert}{gate}.weight", f"{expert}{up}.weight"),
        Rows(local + "linear_fc2.weight", f"{expert}{down}.weight", inputs="ffn"),
    )


FAMILY = Family(
    model_type="mixtral",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    must_be={"hidden_act": "silu", "router_jitter_noise": 0.0},
    sizes=("num_local_experts", "num_experts_per_tok"),
    overrides=lambda fields: {
        "sliding_window": fields["sliding_window"],
        "experts": Experts(fields["num_local_experts"], fields["num_experts_per_tok"], normalized=True),
    },
    layer_ops=expert_ops("block_sparse_moe", "w1", "w3", "w2"),
    model_ops=MODEL_OPS,
    nullable=("head_dim",),
    rope_types=("default", "linear", "llama3"),
    synonyms={"num_experts": "num_local_experts"},
)
