"""DeepSeek-V3 and -R1: latent attention, dense layers first, then mixtures with shared experts and a sigmoid router.

Oddities: a number for each expert (e_score_correction_bias) is added to its score for the choice alone. DeepSeek moved
it while pre-training, to balance the load; here it is a buffer, stays fp32 as loaded and is exported unchanged, so that
log-probs are a function of the weights. The norms inside the attention have epsilon 1e-6 whatever rms_norm_eps says, so
any other is refused. Rotated dimensions stand in neighbouring pairs in the file (rope_interleave); Megatron's attention
reorders queries and keys like transformers', so the weights stay as they are. Megatron ranks a group of experts by its
best num_experts_per_tok / topk_group, DeepSeek by its best two: refused where these differ. Megatron normalizes sigmoid
weights always, so norm_topk_prob=false is refused. Layers of multi-token prediction (model.layers.61 of the released
files, num_nextn_predict_layers) are no part of the model here, as in transformers, and are refused rather than dropped:
take them out of the folder first. The released files are FP8 (quantization_config): convert them to bf16 first.
aux_loss_alpha, seq_aux, ep_size and the like only concern DeepSeek's own training and serving.
"""

from megatron_powerflow.architecture import Experts, Mla
from megatron_powerflow.hf.families.llama import ATTENTION, DEFAULTS, LAYER_OPS, MLP, MODEL_OPS
from megatron_powerflow.hf.families.mixtral import expert_ops
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.operations import Columns, GateUp, InLayers, Replicated, Rows

OURS = "self_attention."
SHARED = "model.layers.{layer}.mlp.shared_experts."
KEPT = ("input_layernorm.weight", "self_attention.linear_proj.weight", "pre_mlp_layernorm.weight")


def _dense(architecture):
    return range(architecture.experts.first_layer)


def _mixed(architecture):
    return range(architecture.experts.first_layer, architecture.num_layers)


def _all_if(wanted):
    return lambda architecture: range(architecture.num_layers if wanted(architecture.mla) else 0)


_direct = _all_if(lambda mla: mla.q_lora_rank is None)
_latent = _all_if(lambda mla: mla.q_lora_rank is not None)

LAYERS = (
    *(op for op in LAYER_OPS if op.megatron in KEPT),
    InLayers(Columns(OURS + "linear_q_proj.weight", ATTENTION + "q_proj.weight", "queries"), _direct),
    InLayers(Replicated(OURS + "linear_q_down_proj.weight", ATTENTION + "q_a_proj.weight", rows="q_latent"), _latent),
    InLayers(Replicated(OURS + "q_layernorm.weight", ATTENTION + "q_a_layernorm.weight", size="q_latent"), _latent),
    InLayers(Columns(OURS + "linear_q_up_proj.weight", ATTENTION + "q_b_proj.weight", "queries", "q_latent"), _latent),
    Replicated(OURS + "linear_kv_down_proj.weight", ATTENTION + "kv_a_proj_with_mqa.weight", rows="kv_latent_and_rope"),
    Replicated(OURS + "kv_layernorm.weight", ATTENTION + "kv_a_layernorm.weight", size="kv_latent"),
    Columns(OURS + "linear_kv_up_proj.weight", ATTENTION + "kv_b_proj.weight", "keys_and_values", "kv_latent"),
    *(
        InLayers(op, _dense)
        for op in (
            GateUp("mlp.linear_fc1.weight", MLP + "gate_proj.weight", MLP + "up_proj.weight", "dense_ffn"),
            Rows("mlp.linear_fc2.weight", MLP + "down_proj.weight", "dense_ffn"),
        )
    ),
    *(
        InLayers(op, _mixed)
        for op in (
            *(op for op in expert_ops("mlp", "gate_proj", "up_proj", "down_proj") if op.megatron.startswith("mlp.")),
            Replicated("mlp.router.expert_bias", MLP + "gate.e_score_correction_bias", size="experts", fp32=True),
            GateUp(
                "mlp.shared_experts.linear_fc1.weight",
                SHARED + "gate_proj.weight",
                SHARED + "up_proj.weight",
                "shared_ffn",
            ),
            Rows("mlp.shared_experts.linear_fc2.weight", SHARED + "down_proj.weight", "shared_ffn"),
        )
    ),
)


def _overrides(fields):
    limited = fields["topk_group"] < fields["n_group"]
    return {
        "num_query_groups": fields["num_attention_heads"],
        "head_dim": fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"],
        "ffn_hidden_size": fields["moe_intermediate_size"],
        "experts": Experts(
            fields["n_routed_experts"],
            fields["num_experts_per_tok"],
            bool(fields["norm_topk_prob"]),
            "sigmoid",
            choice_bias=True,
            num_groups=fields["n_group"] if limited else 1,
            groups_per_token=fields["topk_group"] if limited else 1,
            scaling=float(fields["routed_scaling_factor"]),
            first_layer=fields["first_k_dense_replace"],
            dense_ffn_hidden_size=fields["intermediate_size"],
            shared_ffn_hidden_size=fields["n_shared_experts"] * fields["moe_intermediate_size"],
        ),
        "mla": Mla(
            fields["q_lora_rank"],
            fields["kv_lora_rank"],
            fields["qk_nope_head_dim"],
            fields["qk_rope_head_dim"],
            fields["v_head_dim"],
        ),
    }


def _violations(fields):
    violations = []
    experts, per_token = fields["n_routed_experts"], fields["num_experts_per_tok"]
    groups, best = fields["n_group"], fields["topk_group"]
    nope, rope = fields["qk_nope_head_dim"], fields["qk_rope_head_dim"]
    if fields.get("qk_head_dim") not in (None, nope + rope):
        violations.append(
            f"qk_head_dim={fields['qk_head_dim']} is not qk_nope_head_dim + qk_rope_head_dim = {nope + rope}"
        )
    if fields.get("head_dim", rope) != rope:  # transformers rotates so many, and fails
        violations.append(f"head_dim={fields['head_dim']} is not qk_rope_head_dim={rope}; take head_dim away")
    if rope % 2:
        violations.append(f"qk_rope_head_dim={rope} is odd; dimensions are rotated in pairs")
    if fields["num_key_value_heads"] not in (None, fields["num_attention_heads"]):
        violations.append(
            f"num_key_value_heads={fields['num_key_value_heads']} is not supported; latent attention makes keys and "
            f"values for each of the num_attention_heads={fields['num_attention_heads']} heads"
        )
    dense, layers = fields["first_k_dense_replace"], fields["num_hidden_layers"]
    if not 0 <= dense < layers:
        violations.append(
            f"first_k_dense_replace={dense!r} leaves no layer of num_hidden_layers={layers} with experts; it must be "
            f"0 to {layers - 1}"
        )
    scaling = fields["routed_scaling_factor"]
    if not scaling > 0:
        violations.append(f"routed_scaling_factor={scaling!r} is not supported; it must be a number above 0")
    if not 1 <= best <= groups or experts % groups or experts // groups < 2:
        violations.append(
            f"n_group={groups} with topk_group={best} does not divide n_routed_experts={experts} into groups of two or "
            "more, of which some are chosen"
        )
    elif best < groups and not (per_token // best == 2 and per_token <= best * (experts // groups)):
        violations.append(
            f"num_experts_per_tok={per_token} with topk_group={best} of n_group={groups} is not supported: Megatron "
            f"ranks groups by their best {per_token // best} experts, DeepSeek by their best 2"
        )
    return violations


FAMILY = Family(
    model_type="deepseek_v3",
    defaults={
        **DEFAULTS,
        "num_key_value_heads": None,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 4096,
    },
    must_be={
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_interleave": True,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
    sizes=(
        "moe_intermediate_size",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "n_group",
        "topk_group",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
    ),
    reads=("qk_head_dim", "num_nextn_predict_layers", "aux_loss_alpha", "seq_aux", "ep_size"),
    nullable=("num_key_value_heads",),
    synonyms={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    rope_types=("default", "yarn"),
    violations=_violations,
    overrides=_overrides,
    layer_ops=LAYERS,
    model_ops=MODEL_OPS,
)
