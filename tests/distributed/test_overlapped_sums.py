"""Gradients that are added up over replicas while the backward pass goes on are those that are added up behind it.

On CUDA with replicas that is so by itself; here it is asked for on gloo ranks, with Megatron's own code. With two
replicas a sum has one order, and everything is equal to the last bit.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.megatron_sessions import config_for, opened_session
from tests.distributed.test_training_step import write_prompts

UNTIED = {"tie_word_embeddings": False}
# a budget that holds one group: the replica with the shorter ones has dummies, the last micro-batches of all
PACKED = ["parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=28", "objective.log_z=mlp"]
# name: family, its changes, processes, settings
CASES = {
    "dp2": ("llama", {}, 2, []),
    "dp2_distributed": ("llama", {}, 2, ["optimizer.distributed=true"]),
    "dummies": ("llama", UNTIED, 2, PACKED),
    "several_updates": ("llama", {}, 2, ["optimizer.updates_per_rollout=2"]),
    "shares_without_responses": ("llama", UNTIED, 2, [*PACKED, "parallel.cp=2", "rollout.max_response_tokens=1"]),
    "recomputed_mixture": ("mixtral", {}, 2, ["parallel.ep=2", "model.recompute=selective"]),
    "pp2": ("llama", {}, 4, ["parallel.pp=2", "optimizer.distributed=true"]),
    "pp2_vpp2_dummies": ("llama", UNTIED, 4, ["parallel.pp=2", "parallel.vpp=2", *PACKED]),
}


def three_steps(config, *, overlapped: bool):
    """(rows of each step, weights behind them, how many bucket groups were sent before the end of a backward pass)."""
    from megatron.core.distributed import param_and_grad_buffer

    from megatron_powerflow.training import optimizer
    from megatron_powerflow.training.step import run_step

    bucket_group = param_and_grad_buffer._ParamAndGradBucketGroup
    finish, decide, sent = bucket_group.finish_grad_sync, optimizer.overlaps_sums, []

    def look(group, *arguments, **named):
        sent.append(group.grad_reduce_handle is not None)
        return finish(group, *arguments, **named)

    optimizer.overlaps_sums, bucket_group.finish_grad_sync = (lambda groups: overlapped), look
    try:
        with opened_session(config) as (plan, session):
            rows = [
                run_step(plan, session, plan.prompts[: config.rollout.prompts_per_step], step).rows.numpy()
                for step in range(3)
            ]
            weights = [
                parameter.detach().numpy().copy()
                for chunk in session.trainable.chunks
                for parameter in chunk.parameters()
            ]
            return rows, weights, sent
    finally:
        optimizer.overlaps_sums, bucket_group.finish_grad_sync = decide, finish


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_without_overlap(gloo, tiny_model, tmp_path, case):
    family, changes, ranks, overrides = CASES[case]
    prompts = write_prompts(tmp_path)
    model = tiny_model(family, **changes)
    found = {
        overlapped: gloo.run(
            ranks,
            three_steps,
            config_for(model, prompts, tmp_path / str(overlapped), "objective.alpha=2", *overrides),
            overlapped=overlapped,
        )
        for overlapped in (False, True)
    }
    for (rows, weights, sent), (plain_rows, plain_weights, plain_sent) in zip(found[True], found[False], strict=True):
        np.testing.assert_array_equal(rows, plain_rows)
        for weight, plain in zip(weights, plain_weights, strict=True):
            np.testing.assert_array_equal(weight, plain)
        assert len(sent) == len(plain_sent)
        assert not any(plain_sent)
        first = len(sent) // (3 * (2 if case == "several_updates" else 1))  # Megatron counts in the first, to know when
        assert not any(sent[:first])
        assert all(sent[first:])
