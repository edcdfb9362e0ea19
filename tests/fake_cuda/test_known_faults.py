"""Faults that the product had before its first run on a GPU: each is put back, and shows again."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from tests.fake_cuda import kernels
from tests.fake_cuda.conftest import GPU
from tests.fake_cuda.runs import RECIPES, Case

FP8 = RECIPES[GPU][1:]


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_lengths_padded_to_16_leave_14_rows_a_rank(run_of, monkeypatch, packed):
    """100 tokens at tp=8 were padded to 112, of which sequence parallelism gives each rank 14."""
    from megatron_powerflow.parallel import layout
    from megatron_powerflow.training import micro_batches

    monkeypatch.setattr(layout, "token_multiple", lambda precision, tp, sequence_parallel: math.lcm(16, tp))
    monkeypatch.setattr(micro_batches, "length_step", lambda device: 1)
    alone = () if packed else (("parallel.micro_batch_size", 1),)
    case = Case(
        "tensorwise", tp=8, packed=packed, prompt_tokens=(99,), changes=alone
    )  # first tried: prompt and a token
    with run_of(case) as run, pytest.raises(ValueError, match="product of leading dims = 14"):
        run.step()


def weights_quantized(run) -> Counter:
    """Return how often each weight's shape has been quantized since the start, of shapes that only weights have."""
    linears = [module for chunk in run.chunks for module in chunk.modules() if hasattr(module, "weight_names")]
    shapes = Counter(tuple(getattr(module, name).shape) for module in linears for name in module.weight_names)
    assert len(shapes) == 4  # qkv, proj, fc1, fc2
    return Counter({shape: kernels.calls["quantize", shape] / count for shape, count in shapes.items()})


@pytest.mark.parametrize("recipe", FP8)
@pytest.mark.parametrize("mended", [True, False], ids=["mended", "as it was"])
def test_sampling_after_scoring_makes_fp8_copies_of_the_weights_anew(run_of, monkeypatch, recipe, mended):
    """Transformer Engine makes them when it is told that a first micro-batch comes. Only the schedules told it, so the
    policy sampled with the copies of its last scoring or update, from before the optimizer moved the weights."""
    from megatron_powerflow.training.step import sampling_of_step

    with run_of(Case(recipe, tp=2)) as run:
        run.step()
        if not mended:
            for chunk in run.chunks:
                monkeypatch.setattr(chunk, "set_is_first_microbatch", lambda: None, raising=False)
        before = weights_quantized(run)
        run.session.engine.generate(run.plan.share_of(run.plan.prompts, 0), sampling_of_step(run.plan, 1))
        assert set((weights_quantized(run) - before).values()) == ({1.0} if mended else set())
