"""Activations that are computed again give the same gradients; and they are computed again.

To the last bit, but where norms are: what comes back through a norm and what comes past it is then added in another
order.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from tests.distributed.megatron_sessions import config_for, opened_session
from tests.distributed.test_training_step import write_prompts

SP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]
# name: family, processes, modules, settings, the parts of a layer that run once more
CASES = {
    "mlp": ("llama", 1, "mlp", [], ["mlp"]),
    "the_default": ("qwen2", 1, None, [], ["mlp"]),
    "all_of_a_dense_layer": (
        "gemma2",
        1,
        "mlp,layernorm,core_attn",
        [],
        ["mlp", "input_layernorm", "pre_mlp_layernorm", "self_attention.core_attention"],
    ),
    "norms_behind": ("olmo2", 1, "mlp,core_attn", [], ["mlp", "self_attention.core_attention"]),
    "mixture": ("qwen3_moe", 1, None, [], ["mlp.router"]),
    "mixture_norms": ("mixtral", 1, "layernorm", [], ["input_layernorm", "pre_mlp_layernorm"]),
    "latent": (
        "deepseek_v3",
        1,
        "mla_up_proj,shared_experts,mlp",
        [],
        ["self_attention.linear_kv_up_proj", "mlp.shared_experts"],
    ),
    "tp2_sp": ("llama", 2, "mlp,layernorm,core_attn", SP2, ["mlp", "input_layernorm"]),
    "mixture_ep2": ("mixtral", 2, "moe", ["parallel.ep=2"], ["mlp.router"]),
    "pp2_vpp2": ("llama", 2, "mlp,layernorm", ["parallel.pp=2", "parallel.vpp=2"], ["mlp", "pre_mlp_layernorm"]),
}


class NoFp8:
    """What Transformer Engine says where nothing is FP8; without it Megatron-Core cannot recompute norms."""

    is_fp8_enabled = staticmethod(lambda: False)


def say_no_fp8() -> None:
    from megatron.core.tensor_parallel import random

    random.FP8GlobalStateManager = NoFp8
    random.activation_recompute_forward = random.fp8_autocast = lambda **_: contextlib.nullcontext()


def step_and_calls(config):
    """Rows of a step; HF name -> gradient; name within a layer -> how often it ran in that step."""
    say_no_fp8()
    from megatron_powerflow.hf.live_weights import placements
    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.step import learn, sampling_of_step

    with opened_session(config) as (plan, session):
        prompts = plan.share_of(plan.prompts[: config.rollout.prompts_per_step], session.groups.sampler_rank)
        rollouts = session.engine.generate(prompts, sampling_of_step(plan, 0))
        updates = pack_updates(rollouts, plan, session, 0)
        calls: dict[str, int] = {}
        for chunk in session.trainable.chunks:
            for layer in chunk.decoder.layers:
                for name, module in layer.named_modules():

                    def count(*_, name=name):
                        calls[name] = calls.get(name, 0) + 1

                    module.register_forward_pre_hook(count)
        result = learn(plan, session, updates, 1)
        gradients = {
            placed.hf_names[0]: placed.parameter.main_grad.numpy().copy()
            for placed in placements(session.trainable.chunks, plan.family, session.groups.ep_rank)
            if hasattr(placed.parameter, "main_grad")
        }
        return result.rows.numpy(), gradients, calls


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_those_without_recomputation(gloo, tiny_model, tmp_path, case):
    family, ranks, modules, overrides, again = CASES[case]
    prompts = write_prompts(tmp_path)
    common = ["objective.log_z=mlp", "objective.alpha=2", *overrides]
    plain = gloo.run(ranks, step_and_calls, config_for(tiny_model(family), prompts, tmp_path / "plain", *common))
    settings = ["model.recompute=selective", *([f"model.recompute_modules=[{modules}]"] if modules else [])]
    config = config_for(tiny_model(family), prompts, tmp_path / "again", *common, *settings)
    for (rows, gradients, calls), (plain_rows, plain_gradients, plain_calls) in zip(
        gloo.run(ranks, step_and_calls, config), plain, strict=True
    ):
        np.testing.assert_array_equal(rows, plain_rows)
        assert gradients.keys() == plain_gradients.keys()
        for name, gradient in gradients.items():
            plain_gradient = plain_gradients[name]
            atol = 1e-5 * np.abs(plain_gradient).max() if "layernorm" in (modules or "") else 0.0
            np.testing.assert_allclose(gradient, plain_gradient, rtol=0, atol=atol, err_msg=name)
        assert max(np.abs(gradient).max() for gradient in gradients.values()) > 0
        for name in again:
            assert calls[name] > plain_calls[name], name
        once = {name for name in plain_calls if name.startswith("self_attention.linear_qkv")}
        assert all(calls[name] == plain_calls[name] for name in once)
