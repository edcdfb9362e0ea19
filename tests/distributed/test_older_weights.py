"""Rollouts by older weights of the same run: who is S_old, what v and the lag are, and what is no sampler gap."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_powerflow.metrics.reduce import ReductionSettings, reduce_rollouts
from megatron_powerflow.records import ROLLOUT_COLUMNS
from tests.distributed.megatron_sessions import config_for, opened_session
from tests.distributed.test_training_step import column

CAP = 1.5


def a_step_behind(config):
    """Rows of step 1 on rollouts of step 0, and [B] S of each by the weights that step 1 starts with.

    The first rollout's first token is by step 0's weights and the rest by step 1's, as if they had come in between; the
    second is said to be by step 1's alone; all others are by step 0's.
    """
    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.score import score
    from megatron_powerflow.training.staleness import SampledBy
    from megatron_powerflow.training.step import learn, sampling_of_step

    with opened_session(config) as (plan, session):
        share = plan.share_of(plan.prompts[: config.rollout.prompts_per_step], session.groups.dp_rank)
        rollouts = session.engine.generate(share, sampling_of_step(plan, 0))
        learn(plan, session, pack_updates(rollouts, plan, session, 0), 0)
        first, second, *others = (replace(r, weight_versions=((0, 0, len(r.response_token_ids)),)) for r in rollouts)
        size = len(first.response_token_ids)
        first = replace(first, weight_versions=((0, 0, 1), (1, 1, size)))
        lagged = [first, replace(second, weight_versions=()), *others]
        plan = replace(plan, sampled_by=SampledBy.OLDER)
        updates = pack_updates(lagged, plan, session, 1)
        batches = [batch for batches in updates for batch in batches]
        values = score(session.trainable.chunks, batches, session.scorer)
        started = {}
        for batch, log_probs in zip(batches, values, strict=True):
            started |= dict(zip(batch.rollout_index.tolist(), log_probs.double().sum(dim=1).tolist(), strict=True))
        rows = learn(plan, session, updates, 1).rows.numpy()
        return rows, [started[i] for i in sorted(started)]


@pytest.fixture(scope="module")
def behind(gloo, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt_token_ids": [3 + i, 40 + i, 7]}) + "\n" for i in range(4))
    )
    overrides = ["optimizer.updates_per_rollout=2", "optimizer.lr=5e-3", "objective.sampler_ratio=seq"]
    config = config_for(
        tiny_model("llama"), folder / "prompts.jsonl", folder / "run", *overrides, f"objective.sampler_ratio_cap={CAP}"
    )
    ((rows, started),) = gloo.run(1, a_step_behind, config)
    return rows, np.array(started)


def test_the_old_policy_is_the_trainer_at_the_start_of_the_step_in_every_update(behind):
    """Not the sampler, and in the second update not the policy as it has become."""
    rows, started = behind
    old, sampler = column(rows, "old_sequence_log_prob"), column(rows, "rollout_sequence_log_prob")
    np.testing.assert_allclose(old, started, rtol=1e-6)
    moved = np.abs(column(rows, "sequence_log_prob") - old)
    assert (moved[:4] == 0).all()
    assert (moved[4:] > 1e-4).all()
    assert np.abs(old - sampler).max() > 0.1


def test_v_leads_from_the_sampler_to_the_start_of_the_step(behind):
    rows, _ = behind
    unbounded = np.exp(column(rows, "old_sequence_log_prob") - column(rows, "rollout_sequence_log_prob"))
    np.testing.assert_allclose(column(rows, "sampler_weight"), np.minimum(unbounded, CAP), rtol=1e-5)
    assert (column(rows, "sampler_truncated") == (unbounded > CAP)).all()
    w = np.clip(column(rows, "ratio"), 0.8, 1.2)  # of the two updates
    assert (column(rows, "ratio")[:4] == 1).all()
    np.testing.assert_allclose(column(rows, "importance"), w * column(rows, "sampler_weight"), rtol=1e-6)
    weighted = column(rows, "weight") * column(rows, "residual")
    np.testing.assert_allclose(weighted.reshape(4, 2).sum(axis=1), 0, atol=1e-5)  # the group's log Z' is v's mean, too


def test_the_lag_is_known_by_response_and_is_no_gap(behind):
    rows, _ = behind
    lengths = column(rows, "num_response_tokens")
    assert column(rows, "lag_max").tolist() == [1, 0, *[1] * 6]
    assert column(rows, "lag_sum").tolist() == [1, 0, *lengths[2:]]
    assert column(rows, "num_versions").tolist() == [2, *[1] * 7]
    has_gap = ~np.isnan(column(rows, "sampler_gap_sum"))
    assert has_gap.tolist() == [False, True, *[False] * 6]
    assert (np.isnan(column(rows, "staleness_sum")) == has_gap).all()
    found = reduce_rollouts(rows, ReductionSettings(2, 12, alpha=4.0, learns_log_z=False, has_lag=True))
    assert found["lag_max"] == 1
    assert found["lag_mean"] == pytest.approx((1 + lengths[2:].sum()) / lengths.sum())
    assert found["mixed_versions"] == 1 / 8
    assert found["staleness_mean"] > 1e-3
    assert set(ROLLOUT_COLUMNS) >= {"lag_sum", "lag_max", "num_versions"}
