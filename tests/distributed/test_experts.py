"""A mixture of experts spread over ranks is the mixture on one: loss, gradients, update, samples, checkpoints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.distributed.megatron_sessions import config_for, run_training
from tests.distributed.test_export import generate_to, score_to, tensors_of
from tests.distributed.test_resume import comparable
from tests.distributed.test_training_step import PACKED, PROMPTS, column, loss_of, one_step

SP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]
# family, processes, settings
LAYOUTS = {
    "dp2": ("mixtral", 2, []),
    "ep2": ("mixtral", 2, ["parallel.ep=2"]),
    "ep2_distributed_recompute": (
        "qwen3_moe",
        2,
        ["parallel.ep=2", "optimizer.distributed=true", "model.recompute=full"],
    ),
    "tp2_sp": ("qwen3_moe", 2, SP2),
    "tp2_sp_ep2": ("mixtral", 4, [*SP2, "parallel.ep=2"]),
    "tp2_sp_ep2_three_experts_each": ("qwen3_moe", 4, [*SP2, "parallel.ep=2"]),
    "ep2_pp2": ("qwen3_moe", 4, ["parallel.ep=2", "parallel.pp=2"]),
    "ep2_of_dp4_distributed": ("mixtral", 4, ["parallel.ep=2", "optimizer.distributed=true"]),
    # latent attention: the part of the key that all heads share has heads on both tensor-parallel ranks; its positions
    # go with the stream, to the recomputation too; of four stages of one layer each, the first has no experts
    "latent_tp2_sp": ("deepseek_v3", 2, SP2),
    "latent_packed_cp2_recompute": ("deepseek_v3", 2, [*PACKED, "parallel.cp=2", "model.recompute=full"]),
    "latent_ep2_pp2_vpp2": ("deepseek_v3", 4, ["parallel.ep=2", "parallel.pp=2", "parallel.vpp=2"]),
    "latent_pp4_distributed": ("deepseek_v3", 4, ["parallel.pp=4", "optimizer.distributed=true"]),
}
# of which another row has every part
LONG = ("dp2", "tp2_sp_ep2_three_experts_each", "ep2_of_dp4_distributed")


@pytest.fixture
def prompts(tmp_path):
    return write_prompts(tmp_path / "prompts.jsonl")


def write_prompts(path):
    path.write_text("".join(json.dumps({"prompt_token_ids": tokens}) + "\n" for tokens in PROMPTS))
    return path


@pytest.fixture(scope="module")
def alone(gloo, tiny_model, tmp_path_factory):
    """alone(family, prompts) -> (rows, gradient norm) of the first step on one rank, made once."""
    found = {}

    def run(family, prompts, common):
        if family not in found:
            out = tmp_path_factory.mktemp("alone") / family
            ((rows, norms, _),) = gloo.run(1, one_step, config_for(tiny_model(family), prompts, out, *common))
            found[family] = rows, norms
        return found[family]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in LAYOUTS]
)
def test_a_step_does_not_depend_on_who_holds_the_experts(
    gloo, tiny_model, prompts, tmp_path, alone, record_property, layout
):
    """Same rollouts, loss within 1e-5, gradient norm within 1e-4. Expert gradients are summed, never averaged: each
    expert's are a large share of the norm, so a factor of 2 on them would show."""
    family, num_ranks, overrides = LAYOUTS[layout]
    common = ["objective.log_z=group", "objective.alpha=2"]
    one_rows, one_norms = alone(family, prompts, common)
    config = config_for(tiny_model(family), prompts, tmp_path / layout, *common, *overrides)
    for rows, norms, _ in gloo.run(num_ranks, one_step, config):
        assert (column(rows, "num_response_tokens") == column(one_rows, "num_response_tokens")).all()
        record_property("loss_difference", loss_of(rows) / loss_of(one_rows) - 1)
        record_property("norm_difference", norms[0] / one_norms[0] - 1)
        assert loss_of(rows) == pytest.approx(loss_of(one_rows), rel=1e-5)
        assert norms == pytest.approx(one_norms, rel=1e-4)


def gradients_by_name(config):
    """HF name -> gradient norm of every tensor after a step's backward pass, on rank 0's share of names."""
    from megatron_powerflow.hf.live_weights import placements
    from megatron_powerflow.training.step import run_step
    from tests.distributed.megatron_sessions import opened_session

    with opened_session(config) as (plan, session):
        run_step(plan, session, plan.prompts[: config.rollout.prompts_per_step], 0)
        return {
            placed.hf_names[0]: (placed.parameter.main_grad.norm().item(), placed.parameter.detach().numpy().copy())
            for placed in placements(session.trainable.chunks, plan.family, session.groups.ep_rank)
        }


def test_every_gradient_and_every_updated_weight_is_the_one_of_one_rank(gloo, tiny_model, prompts, tmp_path):
    """Router and each expert by name; after the update, which clips by the norm over all of them, the weights too."""
    common = ["objective.log_z=group", "optimizer.clip_grad=0.5", "parallel.micro_batch_size=4"]
    arguments = (tiny_model("qwen3_moe"), prompts)
    (one,) = gloo.run(1, gradients_by_name, config_for(*arguments, tmp_path / "one", *common))
    two = gloo.run(2, gradients_by_name, config_for(*arguments, tmp_path / "two", *common, "parallel.ep=2"))
    experts = [{name for name in part if ".experts." in name} for part in two]
    assert len(experts[0]) == len(experts[1]) == len({name for name in one if ".experts." in name}) // 2
    assert not experts[0] & experts[1]
    assert two[0].keys() | two[1].keys() == one.keys()
    assert any("mlp.gate" in name for name in one)
    for part in two:
        for name, (norm, weight) in part.items():
            assert norm == pytest.approx(one[name][0], rel=1e-3, abs=1e-6), name
            np.testing.assert_allclose(weight, one[name][1], atol=2e-4, err_msg=name)


def generate_share(model: str, prompts: list, stop: tuple, max_rows: int, **parallel):
    """This data-parallel rank's samples: replica r answers prompts[r]."""
    from megatron_powerflow.config import ModelSection, ParallelSection, PrecisionSection
    from megatron_powerflow.hf.config import read_architecture
    from megatron_powerflow.hf.families import FAMILIES
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.layout import inference_layout
    from megatron_powerflow.records import Prompt, SamplingParams
    from megatron_powerflow.rollout.megatron_engine import MegatronEngine
    from megatron_powerflow.training.policy import build_policy

    launch = read_launch()
    architecture, family = read_architecture(model, FAMILIES)
    layout = inference_layout(ParallelSection(**parallel), architecture, launch.world_size)
    precision = PrecisionSection(dtype="fp32")
    with initialized(layout, launch, seed=0) as groups:
        engine = MegatronEngine(
            build_policy(architecture, family, layout, ModelSection(hf_path=model), precision, groups),
            groups,
            vocab_size=architecture.vocab_size,
            max_concurrent_rows=max_rows,
            alignment=layout.token_multiple(precision),
        )
        mine = [(slot, Prompt(str(slot), slot, tuple(tokens))) for slot, tokens in prompts[groups.dp_rank]]
        rollouts = engine.generate(mine, SamplingParams(2, 12, 1.0, frozenset(stop), seed=7, step=0))
        return groups.dp_rank, [(r.slot, r.response_index, r.response_token_ids, r.finish_reason) for r in rollouts]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "parallel"),
    [(2, {"ep": 2}), (4, {"ep": 2, "pp": 2}), (4, {"ep": 2, "tp": 2, "sequence_parallel": True})],
    ids=["ep2", "ep2_pp2", "tp2_sp_ep2"],
)
def test_replicas_that_share_experts_sample_what_they_would_alone(gloo, tiny_model, num_ranks, parallel):
    """Five prompts on one replica, one on the other: different numbers of waves and batches, and of tokens in each."""
    family = "deepseek_v3" if num_ranks == 4 else "mixtral"
    folder, stop = str(tiny_model(family)), tuple(range(2, 30))
    prompts = list(enumerate([[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21], [30], [40, 41, 42]]))
    ((_, expected),) = gloo.run(1, generate_share, folder, [prompts], stop, 256)
    lengths = [sum(len(item[2]) for item in expected if (item[0] < 5) == many) for many in (True, False)]
    assert lengths[0] != lengths[1]
    assert {item[3] for item in expected} == {"eos", "length"}
    for shares in ([prompts[:5], prompts[5:]], [[], prompts]):
        for replica, answer in gloo.run(num_ranks, generate_share, folder, shares, stop, 4, **parallel):
            slots = {slot for slot, _ in shares[replica]}
            assert answer == [item for item in expected if item[0] in slots]


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "parallel"), [(2, ["parallel.ep=2"]), (4, ["parallel.ep=2", "parallel.pp=2"])])
def test_files_are_answered_and_scored_with_experts_spread_over_ranks(gloo, tiny_model, tmp_path, num_ranks, parallel):
    """Five prompts over two replicas: one has a prompt fewer, of other lengths, and a round of its own without any."""
    prompts, rows = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": list(range(5, 6 + i))}) + "\n" for i in range(5)))
    limits = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=6", "rollout.max_concurrent_rows=1")
    model, answers = str(tiny_model("mixtral")), tmp_path / "answers.jsonl"
    gloo.run(num_ranks, generate_to, model, str(prompts), str(answers), (*limits, *parallel), 32, False)
    answered = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(line["id"], line["response_index"]) for line in answered] == [
        (str(i), r) for i in range(5) for r in range(32)
    ]
    chosen = answered[::18]  # nine of them: again one more on one replica
    lines = [
        {"prompt_token_ids": list(range(5, 6 + int(line["id"]))), "response_token_ids": line["response_token_ids"]}
        for line in chosen
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for ranks, extra in ((1, ()), (num_ranks, parallel)):
        scores = tmp_path / f"scores_{ranks}.jsonl"
        gloo.run(ranks, score_to, model, str(rows), str(scores), (*extra, "parallel.micro_batch_size=2"))
        for line, scored in zip(chosen, scores.read_text().splitlines(), strict=True):
            assert line["log_probs"] == pytest.approx(json.loads(scored)["log_probs"], abs=1e-4)


RUN = """
model: {{hf_path: {model}}}
prompts: {{path: {prompts}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
objective: {{alpha: 2}}
optimizer: {{lr: 1e-3}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 4, output_dir: {out}, export: false}}
"""


@pytest.fixture
def config_file(tiny_model, prompts, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(RUN.format(model=tiny_model("qwen3_moe"), prompts=prompts, out=tmp_path / "run"))
    return path


def loaded_state(config_file, *overrides: str) -> dict:
    """HF names of a parameter -> its fp32 weight, its moments and its count of steps, of the checkpoint that the run
    continues, as this rank has them."""
    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.hf.live_weights import placements
    from tests.distributed.megatron_sessions import opened_session

    with opened_session(load_config(config_file, overrides)) as (plan, session):
        optimizer, found = session.trainable.optimizer, {}
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        state = {parameter: values for part in parts for parameter, values in part.optimizer.state.items()}
        for placed in placements(session.trainable.chunks, plan.family, session.groups.ep_rank):
            weight = getattr(placed.parameter, "main_param", placed.parameter)  # bf16: the optimizer's own copy
            own = state[weight]
            tensors = (weight.detach(), own["exp_avg"], own["exp_avg_sq"], own["step"])
            found[placed.hf_names] = [tensor.numpy().copy() for tensor in tensors]
        return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "before", "after"),
    [
        ("fp32", (1, ()), (2, ("parallel.ep=2",))),
        pytest.param("fp32", (4, ("parallel.ep=2", "parallel.pp=2")), (1, ()), marks=pytest.mark.long),
        ("bf16", (2, ("parallel.ep=2",)), (2, ("parallel.ep=1",))),
    ],
    ids=["1_to_ep2", "ep2_pp2_to_1", "bf16_ep2_to_dp2"],
)
def test_experts_are_loaded_wherever_they_belong_now(gloo, config_file, dtype, before, after):
    """Weights, moments and step counts, bit for bit, between runs with one optimizer and runs with one for experts."""
    precision = f"precision.dtype={dtype}"
    gloo.run(before[0], run_training, config_file, precision, "run.num_steps=2", *before[1])
    then, now = {}, {}
    for found, (num_ranks, settings) in ((then, before), (now, after)):
        for part in gloo.run(num_ranks, loaded_state, config_file, precision, *settings):
            found |= part
    assert then.keys() == now.keys()
    for names, values in then.items():
        assert values[3] == 2
        assert np.abs(values[1]).sum() > 0, names
        assert all(np.array_equal(left, right) for left, right in zip(values, now[names], strict=True)), names


@pytest.fixture(scope="module")
def unbroken(gloo, tiny_model, tmp_path_factory):
    """Three steps with a distributed optimizer and the experts in one place: (config file, lines of the metrics)."""
    folder = tmp_path_factory.mktemp("unbroken")
    write_prompts(folder / "prompts.jsonl")
    path = folder / "config.yaml"
    path.write_text(RUN.format(model=tiny_model("qwen3_moe"), prompts=folder / "prompts.jsonl", out=folder / "run"))
    gloo.run(2, run_training, path, *DISTRIBUTED, "run.num_steps=3")
    return path, comparable(folder / "run")


DISTRIBUTED = ("precision.dtype=fp32", "optimizer.distributed=true", "objective.log_z=group")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((2, ()), (2, ("parallel.ep=2",)), marks=pytest.mark.long),
        ((2, ("parallel.ep=2",)), (2, ())),
        pytest.param((2, ("parallel.ep=2",)), (4, (*SP2, "parallel.ep=2")), marks=pytest.mark.long),
    ],
    ids=["dp2_to_ep2", "ep2_to_dp2", "ep2_to_tp2_sp_ep2"],
)
def test_a_distributed_optimizer_continues_with_its_experts_elsewhere(gloo, unbroken, tmp_path, before, after):
    """A step one way and two the other are three of one kind: the last follows an update with the loaded moments."""
    config_file, expected = unbroken
    for (num_ranks, settings), steps in ((before, 1), (after, 3)):
        overrides = (f"run.output_dir={tmp_path / 'moved'}", f"run.num_steps={steps}", *DISTRIBUTED, *settings)
        gloo.run(num_ranks, run_training, config_file, *overrides)
    for ours, theirs in zip(comparable(tmp_path / "moved"), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_the_choice_bias_of_a_router_stays_as_it_was_loaded(gloo, tiny_model, prompts, tmp_path):
    """Through training in bf16 with the experts spread, a checkpoint and another layout: fp32 and bit for bit."""
    model, path = tiny_model("deepseek_v3"), tmp_path / "config.yaml"
    path.write_text(RUN.format(model=model, prompts=prompts, out=tmp_path / "run"))
    gloo.run(2, run_training, path, "parallel.ep=2", "run.num_steps=1")
    gloo.run(2, run_training, path, "parallel.pp=2", "run.num_steps=2", "run.export=true")
    before, after = tensors_of(model), tensors_of(tmp_path / "run" / "hf_export")
    assert before.keys() == after.keys()
    for layer in (1, 2, 3):
        router = f"model.layers.{layer}.mlp.gate."
        bias, weight = router + "e_score_correction_bias", router + "weight"
        assert after[bias].dtype == torch.float32
        assert torch.equal(after[bias], before[bias])
        assert not torch.equal(after[weight], before[weight].bfloat16())
