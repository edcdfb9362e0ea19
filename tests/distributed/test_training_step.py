"""The first step: its laws, and the same numbers under every layout."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_powerflow.records import ROLLOUT_COLUMNS
from tests.distributed.megatron_sessions import config_for, opened_session

PROMPTS = [[5, 6, 7], [9, 10], [11, 12, 13, 14, 15], [20], [3, 4], [8, 9, 10], [30, 31], [40]]


def write_prompts(folder):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt_token_ids": tokens}) + "\n" for tokens in PROMPTS))
    return path


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path)


def one_step(config):
    """(rows, gradient norms, log Z' start value) of the first step, on every rank."""
    from megatron_powerflow.training.step import run_step

    with opened_session(config) as (plan, session):
        result = run_step(plan, session, plan.prompts[: config.rollout.prompts_per_step], 0)
        return result.rows.numpy(), [taken.grad_norm for taken in result.optimizer_steps], result.log_z_start


def column(rows: np.ndarray, name: str) -> np.ndarray:
    return rows[:, ROLLOUT_COLUMNS.index(name)]


def loss_of(rows: np.ndarray) -> float:
    return float(column(rows, "loss_term").mean())


PACKED = ["parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=40"]
LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "tp2_sp": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2_vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "dp2": (2, []),
    "dp2_distributed": (2, ["optimizer.distributed=true"]),
    "tp2_pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "pp2_dp2": (4, ["parallel.pp=2"]),
    "packed_apart": (2, [*PACKED[:1], "parallel.max_tokens_per_micro_batch=28"]),  # groups of up to 34 tokens
    "packed_cp2": (2, [*PACKED, "parallel.cp=2"]),
    "packed_pp2_dp2": (4, [*PACKED, "parallel.pp=2"]),
    "one_by_one": (1, ["parallel.micro_batch_size=1"]),
    "all_at_once": (1, ["parallel.micro_batch_size=8"]),
    "swap": (1, ["model.reference=swap"]),
    "recompute": (1, ["model.recompute=full"]),
    "recompute_selective": (1, ["model.recompute=selective"]),
}


@pytest.fixture(scope="module")
def step_alone(gloo, tiny_model, tmp_path_factory):
    """What one process makes of the first step, for each way to log Z'."""
    folder = tmp_path_factory.mktemp("alone")
    path = write_prompts(folder)
    return {
        log_z: gloo.run(1, one_step, config_for(tiny_model("qwen2"), path, folder / log_z, *common_of(log_z)))[0]
        for log_z in ("mlp", "group")
    }


def common_of(log_z: str) -> list[str]:
    return [f"objective.log_z={log_z}", "objective.alpha=2"]


@pytest.mark.parametrize("log_z", ["mlp", "group"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_norm_do_not_depend_on_the_layout(
    gloo, tiny_model, prompts, tmp_path, step_alone, layout, log_z
):
    folder, common, alone = tiny_model("qwen2"), common_of(log_z), step_alone[log_z]
    num_ranks, overrides = LAYOUTS[layout]
    config = config_for(folder, prompts, tmp_path / layout, *common, *overrides)
    for rows, grad_norms, log_z_start in gloo.run(num_ranks, one_step, config):
        assert (column(rows, "num_response_tokens") == column(alone[0], "num_response_tokens")).all()
        assert loss_of(rows) == pytest.approx(loss_of(alone[0]), rel=1e-5)
        assert grad_norms == pytest.approx(alone[1], rel=1e-4)
        assert log_z_start == (alone[2] and pytest.approx(alone[2], rel=1e-5))


def one_step_in_few_lengths(config):
    """`one_step` with padded micro-batches as they are on CUDA, and the lengths that they have."""
    from megatron_powerflow.training import micro_batches

    step_of_device, pack, lengths = micro_batches.length_step, micro_batches.pack, set()

    def look(*arguments, **named):
        batches = pack(*arguments, **named)
        lengths.update(batch.tokens.shape[1] for batch in batches)
        return batches

    micro_batches.length_step, micro_batches.pack = lambda device: 128, look
    try:
        return *one_step(config), lengths
    finally:
        micro_batches.length_step, micro_batches.pack = step_of_device, pack


@pytest.mark.parametrize("layout", ["one_by_one", "tp2_sp", "pp2_vpp2"])
def test_loss_and_gradient_norm_do_not_depend_on_the_steps_of_lengths(
    gloo, tiny_model, prompts, tmp_path, step_alone, layout
):
    """Rows of up to 17 tokens, padded to 128."""
    alone = step_alone["mlp"]
    num_ranks, overrides = LAYOUTS[layout]
    config = config_for(tiny_model("qwen2"), prompts, tmp_path / layout, *common_of("mlp"), *overrides)
    for rows, grad_norms, _, lengths in gloo.run(num_ranks, one_step_in_few_lengths, config):
        assert lengths == {128}
        assert loss_of(rows) == pytest.approx(loss_of(alone[0]), rel=1e-5)
        assert grad_norms == pytest.approx(alone[1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_other_norms_windows_and_caps_have_the_same_gradients_in_every_layout(
    gloo, tiny_model, prompts, tmp_path, family
):
    """Norms over all ranks' heads, norms behind attention and MLP, a window shorter than the sequences, capped scores
    and logits."""
    folder = tiny_model(family, sliding_window=3) if family == "gemma2" else tiny_model(family)
    (alone,) = gloo.run(1, one_step, config_for(folder, prompts, tmp_path / "alone", *common_of("mlp")))
    for layout in ("tp2_sp", "tp2_pp2", "packed_cp2", "recompute_selective"):
        num_ranks, overrides = LAYOUTS[layout]
        config = config_for(folder, prompts, tmp_path / layout, *common_of("mlp"), *overrides)
        for rows, grad_norms, _ in gloo.run(num_ranks, one_step, config):
            assert loss_of(rows) == pytest.approx(loss_of(alone[0]), rel=1e-5), layout
            assert grad_norms == pytest.approx(alone[1], rel=1e-4), layout


@pytest.mark.parametrize("weighed", [[], ["objective.sampler_ratio=seq"]])
def test_whole_groups_need_no_forward_pass_of_their_own(gloo, tiny_model, prompts, tmp_path, weighed):
    """Packed with room for groups, log Z' comes out of the loss's own pass; with less room out of one before it. The
    weight v of a step's only update comes out of it, too."""
    folder, common = tiny_model("qwen2"), ["objective.log_z=group", PACKED[0]]
    for budget, passes in ((60, 1), (28, 2)):
        config = config_for(
            folder, prompts, tmp_path / str(budget), *common, f"parallel.max_tokens_per_micro_batch={budget}", *weighed
        )
        ((counted, num_batches),) = gloo.run(1, forward_passes_of_an_update, config)
        assert counted == passes * num_batches


def forward_passes_of_an_update(config) -> tuple[int, int]:
    """(calls of the policy behind the reference's scores, micro-batches)."""
    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.step import learn, sampling_of_step

    with opened_session(config) as (plan, session):
        share = plan.share_of(plan.prompts[: config.rollout.prompts_per_step], 0)
        updates = pack_updates(session.engine.generate(share, sampling_of_step(plan, 0)), plan, session, 0)
        calls = []
        session.trainable.chunks[0].register_forward_hook(lambda *_: calls.append(1))
        learn(plan, session, updates, 0)
        return len(calls), sum(map(len, updates))


def test_dummy_micro_batches_weigh_nothing(gloo, tiny_model, prompts, tmp_path):
    """Interleaving wants two micro-batches of a rank that has one rollout: the other is a dummy."""
    common = ["rollout.responses_per_prompt=1", "rollout.prompts_per_step=2", "parallel.micro_batch_size=null"]
    folder, layout = tiny_model("qwen2"), ["parallel.pp=2", "parallel.vpp=2"]
    budget = "parallel.max_tokens_per_micro_batch=60"
    (alone,) = gloo.run(1, one_step, config_for(folder, prompts, tmp_path / "alone", *common, budget))
    for rows, grad_norms, _ in gloo.run(
        4, one_step, config_for(folder, prompts, tmp_path / "dummies", *common, budget, *layout)
    ):
        assert column(rows, "rollout_index").tolist() == [0, 1]
        assert loss_of(rows) == pytest.approx(loss_of(alone[0]), rel=1e-5)
        assert grad_norms == pytest.approx(alone[1], rel=1e-4)


@pytest.mark.parametrize("preset", ["one_shot_em", "intuitor", "rl_token", "tb_token_step"])
def test_other_objectives_pack_and_split_as_well(gloo, tiny_model, prompts, tmp_path, preset):
    """Entropies, certainties, advantages and per-token spreads, packed on two context-parallel ranks. Not the loss: two
    responses of nearly one certainty have an advantage that divides rounding by rounding."""
    folder, chosen = tiny_model("llama"), f"objective.preset={preset}"
    (alone,) = gloo.run(1, one_step, config_for(folder, prompts, tmp_path / "alone", chosen))
    for rows, grad_norms, _ in gloo.run(
        2, one_step, config_for(folder, prompts, tmp_path / "packed", chosen, *PACKED, "parallel.cp=2")
    ):
        for name in ("sequence_log_prob", "reward"):
            np.testing.assert_allclose(column(rows, name), column(alone[0], name), rtol=1e-5, atol=1e-6)
        assert grad_norms == pytest.approx(alone[1], rel=1e-4)


def test_at_alpha_1_every_residual_is_log_z_exactly(gloo, tiny_model, prompts, tmp_path):
    """Law 4: policy and reference are one model through one scorer, so S - S_ref is 0 to the last bit."""
    config = config_for(tiny_model("llama"), prompts, tmp_path / "run", "objective.alpha=1", "objective.log_z=mlp")
    ((rows, _, log_z),) = gloo.run(1, one_step, config)
    assert (column(rows, "residual") == column(rows, "log_z")).all()
    assert log_z == 0.0


def test_at_step_0_the_mean_residual_is_0(gloo, tiny_model, prompts, tmp_path):
    """Law 3: log Z' starts at (alpha - 1) * mean token log-prob + alpha * mean psi."""
    overrides = ["objective.alpha=4", "objective.psi=-0.5", "objective.log_z=mlp"]
    config = config_for(tiny_model("llama"), prompts, tmp_path / "run", *overrides)
    ((rows, _, log_z),) = gloo.run(1, one_step, config)
    assert column(rows, "residual").mean() == pytest.approx(0.0, abs=1e-5)
    assert column(rows, "residual").std() > 0.1
    expected = 3 * (column(rows, "ref_sequence_log_prob") / column(rows, "num_response_tokens")).mean() - 2.0
    assert log_z == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_sampler_and_scorer_agree_on_every_token(gloo, smollm2, tmp_path, record_property):
    """On the real model, in fp32: under 1e-3 a token (measured: about 3e-5)."""
    path = tmp_path / "prompts.jsonl"
    texts = ["The capital of France is", "Once upon a time", "def add(a, b):", "Two plus two is"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    config = config_for(smollm2, path, tmp_path / "run", "objective.alpha=1", "objective.log_z=mlp")
    ((rows, _, _),) = gloo.run(1, one_step, config)
    record_property("sampler_gap_max", column(rows, "sampler_gap_max").max())
    assert column(rows, "sampler_gap_max").max() < 1e-3
    assert (column(rows, "residual") == column(rows, "log_z")).all()


@pytest.mark.parametrize("log_z", ["mlp", "scalar", "group", "loo", "contrastive"])
def test_one_update_has_weight_exactly_1(gloo, tiny_model, prompts, tmp_path, log_z):
    """Law 19, first half: S_old is scored by the trainer, with the weights that sampled."""
    overrides = ["objective.ratio=seq", f"objective.log_z={log_z}"]
    config = config_for(tiny_model("llama"), prompts, tmp_path / "run", *overrides)
    ((rows, _, _),) = gloo.run(1, one_step, config)
    assert (column(rows, "ratio") == 1.0).all()


@pytest.mark.parametrize("ratio", ["seq", "seq_mean"])
def test_a_stale_update_has_weights_within_the_clip(gloo, tiny_model, prompts, tmp_path, ratio):
    """Law 19, second half: the second of two updates is stale; its weight moves and is clipped."""
    overrides = [f"objective.ratio={ratio}", "optimizer.updates_per_rollout=2", "objective.clip_epsilon=0.001"]
    config = config_for(tiny_model("llama"), prompts, tmp_path / "run", *overrides)
    ((rows, _, _),) = gloo.run(1, one_step, config)
    first, second = column(rows, "ratio")[:4], column(rows, "ratio")[4:]
    assert (first == 1.0).all()
    assert (second != 1.0).all()
    weight = column(rows, "weight")
    assert weight.min() >= 0.999 - 1e-6
    assert weight.max() <= 1.001 + 1e-6


def test_a_wrong_estimator_of_old_would_show(gloo, tiny_model, prompts, tmp_path):
    """With ratio=none the same two updates have weight 1: the option above really acts."""
    config = config_for(
        tiny_model("llama"), prompts, tmp_path / "run", "optimizer.updates_per_rollout=2", "objective.ratio=none"
    )
    ((rows, grad_norms, _),) = gloo.run(1, one_step, config)
    assert (column(rows, "weight") == 1.0).all()
    assert len(grad_norms) == 2


def test_dropped_truncated_responses_take_no_part(gloo, tiny_model, prompts, tmp_path):
    """objective.truncated=drop: they count in no denominator and move nothing."""
    folder = tiny_model("llama", scale=0.02, eos_token_id=tuple(range(2, 60)))
    common = ["rollout.max_response_tokens=3", "objective.log_z=group", "rollout.responses_per_prompt=8"]
    keep = config_for(folder, prompts, tmp_path / "keep", *common)
    drop = config_for(folder, prompts, tmp_path / "drop", *common, "objective.truncated=drop")
    ((kept_rows, kept_norm, _),) = gloo.run(1, one_step, keep)
    ((rows, norm, _),) = gloo.run(1, one_step, drop)
    truncated = column(rows, "truncated") > 0
    assert 0 < truncated.sum() < len(rows)
    assert ((column(rows, "kept") == 0) == truncated).all()
    assert (column(kept_rows, "kept") == 1).all()
    assert norm != pytest.approx(kept_norm, rel=1e-3)
    ((two_ranks, norm_of_two, _), _) = gloo.run(2, one_step, drop)  # B is counted over both ranks
    assert norm_of_two == pytest.approx(norm, rel=1e-4)
    np.testing.assert_allclose(column(two_ranks, "log_z"), column(rows, "log_z"), rtol=1e-5)
