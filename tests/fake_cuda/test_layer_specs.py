"""Which layers does a model have on CUDA where Transformer Engine is installed, and which FP8 recipe do they get?"""

from __future__ import annotations

import pytest
import torch

from tests.fake_cuda.conftest import GPU
from tests.fake_cuda.runs import RECIPES, Case

TE_LAYERS = [
    "TELayerNormColumnParallelLinear",
    "CachedTEAttention",
    "TERowParallelLinear",
    "TELayerNormColumnParallelLinear",
    "TERowParallelLinear",
]
OWN_LAYERS = [
    "ColumnParallelLinear",
    "SdpaCoreAttention",
    "RowParallelLinear",
    "ColumnParallelLinear",
    "RowParallelLinear",
]
OF_RECIPE = {"tensorwise": "Float8CurrentScaling", "blockwise": "Float8BlockScaling", "mxfp8": "MXFP8BlockScaling"}


def layers_of(run) -> list[str]:
    layer = run.chunks[0].decoder.layers[0]
    attention, mlp = layer.self_attention, layer.mlp
    parts = (attention.linear_qkv, attention.core_attention, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
    return [type(part).__name__ for part in parts]


@pytest.mark.parametrize("recipe", RECIPES[GPU])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_transformer_engine_has_the_layers(run_of, family, recipe):
    with run_of(Case(recipe, tp=2), family) as run:
        assert layers_of(run) == TE_LAYERS
        parameters = list(run.chunks[0].parameters())
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        assert all(parameter.is_cuda for parameter in parameters)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_models_that_it_has_no_words_for_have_our_own(run_of, family):
    with run_of(Case(tp=2), family) as run:
        assert layers_of(run) == OWN_LAYERS


def test_fp32_never_runs_on_it(run_of):
    with run_of(Case(changes=(("precision.dtype", "fp32"),))) as run:
        assert layers_of(run) == OWN_LAYERS
        assert {parameter.dtype for parameter in run.chunks[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES[GPU] if recipe != "bf16"])
def test_the_recipe_of_the_config_reaches_its_products(run_of, recipe):
    """Megatron-Core makes Transformer Engine's recipe of the config's fields, and the layers run under it: E4M3 for
    activations and weights, E5M2 for gradients, no history that a checkpoint would have to keep."""
    from megatron.core.fp8_utils import get_fp8_recipe

    with run_of(Case(recipe)) as run:
        made = get_fp8_recipe(run.chunks[0].config)
        assert type(made).__name__ == OF_RECIPE[recipe]
        run.step()
        linear = run.chunks[0].decoder.layers[0].mlp.linear_fc2
        assert linear.fp8
        assert not linear.primary_weights_in_fp8
        assert type(linear.fp8_meta["recipe"]).__name__ == OF_RECIPE[recipe]
