"""A mixture whose experts are one grouped product is the mixture of separate experts: loaded, exported, saved, trained.

The grouped product is Transformer Engine's, which needs a GPU. Here Megatron's own `TEGroupedMLP` is built around a
layer of ours in its place, with its interface, its parameters' names and shapes (weight0, weight1, ... [out, in], as
`GroupedLinear` of 2.20 registers them) and its names in a checkpoint.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from tests.distributed.megatron_sessions import run_training
from tests.distributed.test_resume import comparable, weights
from tests.distributed.test_training_step import write_prompts

SP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]
LAYOUTS = {
    "alone": (1, []),
    "ep2": (2, ["parallel.ep=2"]),
    "tp2_sp": (2, SP2),
    "tp2_sp_ep2": (4, [*SP2, "parallel.ep=2"]),
}


class GroupedLinear(nn.Module):
    """Transformer Engine's interface over torch's products. cut: the dimension that tensor-parallel ranks share."""

    cut = 0
    built = 0

    def __init__(self, num_gemms, input_size, output_size, *, config, is_expert, pg_collection, **_) -> None:
        super().__init__()
        assert is_expert
        GroupedLinear.built += 1
        self.num_gemms, self._groups = num_gemms, pg_collection
        shape = [output_size, input_size]
        shape[self.cut] //= pg_collection.expt_tp.size()
        for index in range(num_gemms):
            weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            weight.allreduce = config.expert_model_parallel_size == 1
            weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, self.cut, 1
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x, m_splits):
        parts = x.split(m_splits)
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        return torch.cat([part @ weight.t() for part, weight in zip(parts, weights, strict=True)]), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """As `TEGroupedLinear._sharded_state_dict_grouped`, with an empty state beside each weight as without FP8."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        groups, sharded = self._groups, {}
        for index in range(self.num_gemms):
            place = (len(sharded_offsets), groups.ep.rank() * self.num_gemms + index, groups.ep.size() * self.num_gemms)
            state = {"weight": getattr(self, f"weight{index}"), "_extra_state": torch.empty(0, dtype=torch.uint8)}
            part = make_sharded_tensors_for_checkpoint(
                state,
                prefix,
                {"weight": self.cut},
                (*sharded_offsets, place),
                tp_group=groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for entry in part.values():
                entry.replica_id = (*entry.replica_id[:2], groups.expt_dp.rank())
            sharded[f"{prefix}weight{index}"] = part[f"{prefix}weight"]
            sharded[f"{prefix}_extra_state{index or ''}"] = part[f"{prefix}_extra_state"]
        return sharded


class RowCut(GroupedLinear):
    cut = 1


def layer_with_groups(own_layer, config, architecture, num_experts):
    """`build._own_layer`, its experts in one grouped product, as Megatron's layers for Transformer Engine have them."""
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import TEGroupedMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    layer = own_layer(config, architecture, num_experts)
    products = MLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=RowCut)
    mlp = layer.submodules.mlp
    if isinstance(mlp, ModuleSpec):
        mlp.submodules.experts = ModuleSpec(module=TEGroupedMLP, submodules=products)
    else:  # Megatron-Core 0.19
        mlp.keywords["submodules"].experts = partial(TEGroupedMLP, submodules=products)
    return layer


def train_as(kind: str, config, *overrides: str) -> int:
    """Train as the command line does. Returns how many grouped products the models of this rank have."""
    from megatron_powerflow.model import build
    from megatron_powerflow.model.fused_kernels import FusedKernels

    own_layer, choose, before = build._own_layer, build.fused_kernels, GroupedLinear.built
    if kind == "grouped":
        build._own_layer = partial(layer_with_groups, own_layer)
        build.fused_kernels = lambda *_: FusedKernels(False, moe_grouped_gemm=True, gradient_accumulation_fusion=False)
    try:
        run_training(config, *overrides)
    finally:
        build._own_layer, build.fused_kernels = own_layer, choose
    return GroupedLinear.built - before


@pytest.fixture
def config(tiny_model, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tiny_model("qwen3_moe")}}}
precision: {{dtype: fp32}}
prompts: {{path: {write_prompts(tmp_path)}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 8}}
objective: {{alpha: 2, log_z: group}}
optimizer: {{lr: 1e-3}}
checkpoint: {{interval: 2}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 4, output_dir: {tmp_path / "unused"}}}
"""
    )
    return path


LONGEST = "tp2_sp_ep2"  # a minute, for what the other two show apart


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.long) if name == LONGEST else name for name in LAYOUTS]
)
def test_runs_of_both_kinds_are_one_and_go_on_from_each_others_checkpoints(gloo, config, tmp_path, layout):
    ranks, overrides = LAYOUTS[layout]
    courses = {"separate": ["separate"], "grouped": ["grouped"], "first": ["grouped", "separate"]}
    courses["last"] = ["separate", "grouped"]
    for name, kinds in courses.items():
        for number, kind in enumerate(kinds, start=1):
            steps = 4 * number // len(kinds)
            built = gloo.run(
                ranks, train_as, kind, config, f"run.output_dir={tmp_path / name}", f"run.num_steps={steps}", *overrides
            )
            assert all((count > 0) == (kind == "grouped") for count in built)
    lines = {name: comparable(tmp_path / name) for name in courses}
    weights_of = {name: weights(tmp_path / name) for name in courses}
    for name in courses:
        assert len(lines[name]) == 4
        for ours, plain in zip(lines[name], lines["separate"], strict=True):
            assert ours["response_length_mean"] == plain["response_length_mean"]
            assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
            assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)
        assert weights_of[name].keys() == weights_of["separate"].keys()
        assert any(".experts.1." in key for key in weights_of[name])
        for key, weight in weights_of[name].items():
            torch.testing.assert_close(weight, weights_of["separate"][key], rtol=0, atol=2e-4, msg=key)
