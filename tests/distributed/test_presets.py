"""Every objective: the same step under every layout, and a step that does what its formula says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_powerflow.objective.presets import PRESETS
from tests.distributed.megatron_sessions import config_for
from tests.distributed.test_training_step import column, loss_of, one_step

LAYOUTS = {
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "dp2": (2, []),
}
SETTINGS = {"flow_rl": ["objective.log_z=group"], "tb_token_step": ["objective.log_z=loo"]}


@pytest.fixture(scope="module")
def boxing(tiny_model):
    """A small vocabulary in which four tokens are boxed answers: most random responses give one."""
    return tiny_model("llama", vocab_size=10, scale=0.2, boxes=True, eos_token_id=2)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt_token_ids": tokens, "answer": "1"} for tokens in ([5, 6, 7], [9, 8], [5], [6, 7, 8, 9])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(preset, boxing, prompts, out, *overrides):
    sizes = ["rollout.responses_per_prompt=6", "rollout.max_response_tokens=16", "parallel.micro_batch_size=3"]
    return config_for(boxing, prompts, out, f"objective.preset={preset}", *SETTINGS.get(preset, []), *sizes, *overrides)


# one of each kind of loss; the others are slow together, and of those that differ in a weight only, one is
QUICK = ("la_tb", "tb_token_step", "flow_rl", "grpo", "one_shot_em")
LONG = ("tb_token_target", "tb_token_score", "rl_token")


@pytest.mark.parametrize(
    "preset",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.long if name in LONG else pytest.mark.slow)
        for name in PRESETS
    ],
)
def test_a_step_does_not_depend_on_the_layout(gloo, boxing, prompts, tmp_path, preset):
    ((alone, alone_norms, _),) = gloo.run(1, one_step, config_of(preset, boxing, prompts, tmp_path / "alone"))
    assert alone_norms[0] > 1e-4  # something moves
    for name, (num_ranks, overrides) in LAYOUTS.items():
        config = config_of(preset, boxing, prompts, tmp_path / name, *overrides)
        for rows, norms, _ in gloo.run(num_ranks, one_step, config):
            assert (column(rows, "num_response_tokens") == column(alone, "num_response_tokens")).all()
            np.testing.assert_array_equal(column(rows, "correct"), column(alone, "correct"))
            # the advantages of a group cancel: the loss is small against its terms
            size = np.abs(column(alone, "loss_term")).mean()
            assert loss_of(rows) == pytest.approx(loss_of(alone), abs=1e-4 * size), name
            assert norms == pytest.approx(alone_norms, rel=1e-4), name


@pytest.mark.parametrize("preset", ["empo", "ttrl"])
def test_rewards_of_a_group_are_those_of_the_whole_group_however_it_is_packed(gloo, boxing, prompts, tmp_path, preset):
    """Packed streams spread a group over ranks: six responses of one prompt, streams of one to three."""
    ((alone, _, _),) = gloo.run(1, one_step, config_of(preset, boxing, prompts, tmp_path / "alone"))
    assert len(set(column(alone, "reward"))) > 1
    packed = ["parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=32"]
    config = config_of(preset, boxing, prompts, tmp_path / "packed", *packed)
    for rows, _, _ in gloo.run(2, one_step, config):
        for name in ("reward", "distinct_2"):
            np.testing.assert_allclose(column(rows, name), column(alone, name), atol=1e-12)


def test_the_rewards_are_those_of_the_text(gloo, boxing, prompts, tmp_path):
    ((rows, _, _),) = gloo.run(1, one_step, config_of("grpo", boxing, prompts, tmp_path / "grpo"))
    np.testing.assert_array_equal(column(rows, "reward"), column(rows, "correct"))
    assert 0 < column(rows, "correct").mean() < 1
    ((rows, _, _),) = gloo.run(1, one_step, config_of("format_only", boxing, prompts, tmp_path / "format"))
    np.testing.assert_array_equal(column(rows, "reward"), column(rows, "boxed"))
    assert 0 < column(rows, "boxed").mean() < 1


def test_the_advantage_of_intuitor_is_the_certainty_of_whole_distributions(gloo, boxing, prompts, tmp_path):
    """logsumexp - mean of the logits, averaged over the response, against full logits by transformers."""
    ((rewards, expected),) = gloo.run(1, certainties, config_of("intuitor", boxing, prompts, tmp_path / "run"))
    np.testing.assert_allclose(rewards, expected, atol=1e-5)
    assert np.std(expected) > 1e-4


def certainties(config):
    """(our reward of each rollout, the same from a plain forward pass of transformers)."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.score import score_certainty
    from megatron_powerflow.training.step import sampling_of_step
    from tests.distributed.megatron_sessions import opened_session

    with opened_session(config) as (plan, session):
        rollouts = session.engine.generate(plan.share_of(plan.prompts[:4], 0), sampling_of_step(plan, 0))
        (batches,) = pack_updates(rollouts, plan, session, 0)
        ours = score_certainty(session.trainable.chunks, batches, session.scorer)
    by_index = {}
    for batch, values in zip(batches, ours, strict=True):
        by_index |= dict(zip(batch.rollout_index.tolist(), values.tolist(), strict=True))
    network = AutoModelForCausalLM.from_pretrained(config.model.hf_path, dtype=torch.float32).eval()
    expected = {}
    for rollout in rollouts:
        tokens = torch.tensor([rollout.prompt.token_ids + rollout.response_token_ids])
        with torch.no_grad():
            logits = network(tokens).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        index = rollout.slot * 6 + rollout.response_index
        expected[index] = float((logits.logsumexp(-1) - logits.mean(-1)).mean())
    order = sorted(expected)
    return [by_index[i] for i in order], [expected[i] for i in order]


@pytest.mark.parametrize("ratio", ["seq", "seq_mean", "token"])
def test_a_stale_update_of_a_rival_is_clipped(gloo, boxing, prompts, tmp_path, ratio):
    overrides = [f"objective.ratio={ratio}", "optimizer.updates_per_rollout=2", "objective.clip_epsilon=1e-4"]
    config = config_of("format_only", boxing, prompts, tmp_path / "run", *overrides, "optimizer.lr=1e-2")
    ((rows, _, _),) = gloo.run(1, one_step, config)
    assert (column(rows, "clipped")[:12] == 0).all()
    assert column(rows, "clipped")[12:].mean() > 0.5


def test_a_task_reward_enters_the_residual(gloo, boxing, prompts, tmp_path):
    common = ["objective.log_z=group", "objective.alpha=2"]
    ((plain, _, _),) = gloo.run(1, one_step, config_of("la_tb", boxing, prompts, tmp_path / "a", *common))
    settings = ["objective.task_reward=gold", "objective.reward_scale=3"]
    ((rows, _, _),) = gloo.run(1, one_step, config_of("la_tb", boxing, prompts, tmp_path / "b", *common, *settings))
    np.testing.assert_allclose(column(rows, "reward"), 3 * column(rows, "correct"))
    partial = column(rows, "residual") - column(rows, "log_z")
    np.testing.assert_allclose(
        partial, column(plain, "residual") - column(plain, "log_z") - 3 * column(rows, "correct"), atol=1e-5
    )


def test_a_kl_term_pulls_towards_the_base(gloo, boxing, prompts, tmp_path):
    """At step 0 policy and base are one: the term is 0 and so is its gradient; after one update it is not."""
    two = ["optimizer.updates_per_rollout=2", "optimizer.lr=1e-2"]
    ((plain, _, _),) = gloo.run(1, one_step, config_of("format_only", boxing, prompts, tmp_path / "a", *two))
    config = config_of("format_only", boxing, prompts, tmp_path / "b", *two, "objective.kl_coefficient=10")
    ((rows, _, _),) = gloo.run(1, one_step, config)
    np.testing.assert_allclose(column(rows, "loss_term")[:12], column(plain, "loss_term")[:12], atol=1e-6)
    assert (column(rows, "loss_term")[12:] > column(plain, "loss_term")[12:]).all()
