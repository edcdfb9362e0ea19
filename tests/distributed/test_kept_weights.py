"""FP8 copies of weights are never stale: after an update, a swap and a swap back, the next pass makes them anew.

Transformer Engine's layers keep a quantized copy of their weight, and make another where `is_first_microbatch` says so.
Transformer Engine needs a GPU. Here each matrix of the real model keeps a copy of its weight by the same rule
(`TELinear` of Megatron-Core: True at first, False after each pass, True again by `set_is_first_microbatch`), in fp32:
a stale copy gives other samples and scores, and one that is not stale the same bits.
"""

from __future__ import annotations

from types import MethodType

import numpy as np
import pytest

from tests.distributed.megatron_sessions import config_for, opened_session
from tests.distributed.test_training_step import write_prompts

LAYOUTS = {
    "alone": (1, []),
    "swap": (1, ["model.reference=swap"]),
    "several_updates": (1, ["optimizer.updates_per_rollout=2", "model.reference=swap"]),
    "pp2": (2, ["parallel.pp=2", "model.reference=swap"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2", "model.reference=swap"]),
    "dp2_distributed": (2, ["optimizer.distributed=true"]),
}


class Counts:
    """Passes of all matrices, and the copies that were made for them."""

    def __init__(self) -> None:
        self.passes = self.copies = 0


def keep_copies(chunks, counts: Counts) -> None:
    """Let each matrix of the layers multiply by its copy."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    def forward(linear, *arguments, **named):
        counts.passes += 1
        if linear.is_first_microbatch:
            counts.copies += 1
            linear.kept = linear.weight.data.clone()
        linear.is_first_microbatch = False
        weight, linear.weight.data = linear.weight.data, linear.kept
        try:
            return type(linear).forward(linear, *arguments, **named)
        finally:
            linear.weight.data = weight

    for chunk in chunks:
        chunk.config.fp8 = "hybrid"  # Megatron announces only then; its layers were built without
        for linear in chunk.decoder.modules():
            if isinstance(linear, ColumnParallelLinear | RowParallelLinear):
                linear.is_first_microbatch = True
                linear.forward = MethodType(forward, linear)


def three_steps(config, *, kept: bool, announced: bool = True):
    """Rows, tokens and the sampler's log-probs of each of three steps; and the counts of this rank."""
    from megatron.core.transformer.module import MegatronModule

    from megatron_powerflow.training.step import run_step

    counts, announce = Counts(), MegatronModule.set_is_first_microbatch
    if not announced:
        MegatronModule.set_is_first_microbatch = lambda module: None
    try:
        with opened_session(config) as (plan, session):
            if kept:
                keep_copies(session.trainable.chunks, counts)
                if config.model.reference == "resident":
                    with session.reference.weights() as chunks:
                        keep_copies(chunks, counts)
            steps = []
            for step in range(3):
                result = run_step(plan, session, plan.prompts[: config.rollout.prompts_per_step], step)
                tokens = [rollout.response_token_ids for rollout in result.rollouts]
                sampled = [rollout.rollout_log_probs for rollout in result.rollouts]
                steps.append((result.rows.numpy(), tokens, sampled))
            return steps, counts.passes, counts.copies
    finally:
        MegatronModule.set_is_first_microbatch = announce


def same(left, right) -> bool:
    return all(
        np.array_equal(ours[0], theirs[0], equal_nan=True) and ours[1:] == theirs[1:]
        for ours, theirs in zip(left, right, strict=True)
    )


@pytest.fixture
def config_of(tiny_model, tmp_path):
    def make(layout: str):
        settings = ["objective.log_z=mlp", "objective.alpha=2", "optimizer.lr=1e-2", *LAYOUTS[layout][1]]
        return config_for(tiny_model("llama"), write_prompts(tmp_path), tmp_path / layout, *settings)

    return make


@pytest.mark.parametrize(
    "layout", [name if name in ("swap", "pp2_vpp2") else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_kept_copies_give_the_bits_of_the_weights_themselves(gloo, config_of, layout):
    num_ranks, config = LAYOUTS[layout][0], config_of(layout)
    plain = gloo.run(num_ranks, three_steps, config, kept=False)
    kept = gloo.run(num_ranks, three_steps, config, kept=True)
    for (ours, passes, copies), (theirs, _, _) in zip(kept, plain, strict=True):
        assert same(ours, theirs)
        assert 0 < copies < passes / 2  # most passes multiply by a copy that was made before


def test_without_the_announcements_the_copies_are_stale(gloo, config_of):
    """What the test above would see."""
    config = config_of("swap")
    (plain, _, _) = gloo.run(1, three_steps, config, kept=False)[0]
    (stale, _, _) = gloo.run(1, three_steps, config, kept=True, announced=False)[0]
    assert not same(stale[1:], plain[1:])
