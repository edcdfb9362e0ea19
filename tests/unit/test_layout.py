"""Layouts: which ranks go where, and why an impossible one is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_powerflow.architecture import Architecture, Experts
from megatron_powerflow.config import PrecisionSection
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.layout import Layout, balanced_layers, plan_layout
from tests.architectures import make_architecture

ARCHITECTURE = make_architecture()
MINIMAL = {"model": {"hf_path": "m"}, "prompts": {"path": "p"}, "run": {"output_dir": "o"}}


MIXTURE = replace(ARCHITECTURE, experts=Experts(6, 2, normalized=True))


def plan(world_size: int, *overrides: str, architecture: Architecture = ARCHITECTURE) -> Layout:
    return plan_layout(parse_config(MINIMAL, overrides), architecture, world_size)


def test_tp_may_be_a_multiple_of_the_query_groups():
    """Twelve heads of Qwen2.5-1.5B in two groups; 2 x head_dim must be a multiple of the ranks of a group."""
    architecture = replace(ARCHITECTURE, num_attention_heads=12, num_query_groups=2)
    for tp in (1, 2, 4, 6, 12):
        if 2 * architecture.head_dim % max(tp // 2, 1) == 0:
            assert plan(tp, f"parallel.tp={tp}", architecture=architecture).tp == tp
        else:
            with pytest.raises(UserError, match=f"parallel.tp={tp} is no divisor .* choose 1, 2 or 4"):
                plan(tp, f"parallel.tp={tp}", architecture=architecture)
    with pytest.raises(UserError, match=r"parallel\.tp=3 is no divisor of num_query_groups=2"):
        plan(3, "parallel.tp=3", architecture=architecture)


def test_dp_follows_from_the_number_of_processes():
    layout = plan(12, "parallel.tp=3", "parallel.pp=2")
    assert (layout.tp, layout.pp, layout.dp, layout.world_size) == (3, 2, 2, 12)


def test_the_picture_is_megatrons_rank_order():
    picture = plan(12, "parallel.tp=3", "parallel.pp=2").picture()
    assert picture.splitlines()[1].split() == ["dp", "0", "0", "1", "2", "6", "7", "8"]
    assert picture.splitlines()[2].split() == ["dp", "1", "3", "4", "5", "9", "10", "11"]


@pytest.mark.parametrize(
    ("world_size", "overrides", "words"),
    [
        (3, ["parallel.tp=2"], ["3 processes do not hold", "num_attention_heads=9; choose 1 or 3"]),
        (2, ["parallel.tp=2"], ["num_attention_heads=9; choose 1 or 3"]),
        (32, ["parallel.pp=32"], ["parallel.pp=32 needs 32 layers or more, and num_layers=30; choose fewer stages"]),
        (2, ["parallel.pp=2", "parallel.vpp=16"], ["parallel.pp=2 x vpp=16 needs 32 layers or more"]),
        (2, ["parallel.pp=2", "parallel.layers_per_chunk=[10,21]"], ["has 2 numbers with the sum 31", "[15, 15]"]),
        (4, ["parallel.pp=4", "parallel.layers_per_chunk=[10,20]"], ["has 2 numbers with the sum 30", "[7, 8, 8, 7]"]),
        (2, ["parallel.pp=2", "parallel.vpp=1"], ["no interleaving"]),
        (3, ["parallel.cp=2"], ["3 processes do not hold tp=1 x cp=2 x pp=1 = 2"]),
        (1, ["parallel.max_tokens_per_micro_batch=4000"], ["has no room", "4096 tokens", "choose 4096 or more"]),
        (
            12,
            [
                "parallel.cp=4",
                "parallel.tp=3",
                "parallel.sequence_parallel=true",
                "parallel.max_tokens_per_micro_batch=4096",
            ],
            ["in multiples of 24; choose 4104 or more"],
        ),
        (2, ["parallel.ep=2"], ["parallel.ep=2: llama has no experts"]),
        (3, [], ["dp=3 does not divide the 32 prompts"]),
        (1, ["parallel.micro_batch_size=3"], ["micro_batch_size=3 does not divide the 512 rollouts"]),
        (1, ["rollout.prompts_per_step=4", "optimizer.updates_per_rollout=8"], ["does not divide"]),
    ],
)
def test_impossible_layouts_are_refused_with_the_reason(world_size, overrides, words):
    with pytest.raises(UserError) as caught:
        plan(world_size, *overrides)
    text = "\n".join(caught.value.violations)
    assert all(word in text for word in words), text


def test_one_kind_of_micro_batch_at_a_time():
    with pytest.raises(UserError, match=r"micro_batch_size=4 has no effect because parallel\.max_tokens"):
        plan(1, "parallel.micro_batch_size=4", "parallel.max_tokens_per_micro_batch=5000")
    assert plan(1, "parallel.max_tokens_per_micro_batch=5000", "rollout.responses_per_prompt=3").dp == 1


@pytest.mark.parametrize(
    ("world_size", "overrides", "sequence", "positions"),
    [
        (1, [], 1, 1),
        (3, ["parallel.tp=3", "parallel.sequence_parallel=true"], 1, 3),
        (2, ["parallel.cp=2"], 4, 4),
        (6, ["parallel.cp=2", "parallel.tp=3", "parallel.sequence_parallel=true"], 4, 12),
    ],
)
def test_positions_come_in_multiples_that_every_axis_can_split(world_size, overrides, sequence, positions):
    layout = plan(world_size, *overrides)
    assert (layout.sequence_multiple, layout.position_multiple(PrecisionSection(dtype="fp32"))) == (sequence, positions)


@pytest.mark.parametrize(
    ("world_size", "overrides", "words"),
    [
        (4, ["parallel.ep=4"], ["parallel.ep=4 does not divide the 6 experts; choose 1, 2, 3 or 6"]),
        (4, ["parallel.ep=3"], ["parallel.ep=3 does not divide cp x dp = 4", "choose 1, 2 or 4"]),
        (6, ["parallel.tp=3", "parallel.ep=2"], ["parallel.tp=3 with experts needs sequence parallelism"]),
    ],
)
def test_impossible_spreads_of_experts_are_refused_with_the_reason(world_size, overrides, words):
    with pytest.raises(UserError) as caught:
        plan(world_size, *overrides, architecture=MIXTURE)
    text = "\n".join(caught.value.violations)
    assert all(word in text for word in words), text


def test_experts_are_spread_over_neighbouring_replicas_of_a_stage():
    settings = ["parallel.tp=3", "parallel.sequence_parallel=true", "parallel.pp=2", "parallel.ep=2"]
    layout = plan(24, *settings, architecture=MIXTURE)
    assert [list(ranks) for ranks in layout.expert_ranks[:4]] == [[0, 3], [1, 4], [2, 5], [6, 9]]
    assert sorted(rank for ranks in layout.expert_ranks for rank in ranks) == list(range(24))
    assert "ep 2 over dp" in layout.describe()
    assert layout.picture().splitlines()[-1] == "  experts  0 3 | 1 4 | 2 5 | ..."


def test_interleaving_needs_micro_batches_in_multiples_of_pp():
    settings = ["parallel.pp=2", "parallel.vpp=3", "rollout.prompts_per_step=1", "rollout.responses_per_prompt=3"]
    with pytest.raises(UserError, match="no multiple of pp=2"):
        plan(2, *settings, "parallel.micro_batch_size=1")
    assert plan(2, *settings[:3], "parallel.micro_batch_size=4").num_chunks == 3


def test_prompts_are_shared_in_whole_groups_and_equal_updates():
    from megatron_powerflow.training.plan import Plan

    config = parse_config(MINIMAL, ["rollout.prompts_per_step=8", "optimizer.updates_per_rollout=2"])
    layout = plan_layout(config, ARCHITECTURE, 2)
    a_plan = Plan.__new__(Plan)
    object.__setattr__(a_plan, "config", config)
    object.__setattr__(a_plan, "layout", layout)
    shares = [[slot for slot, _ in a_plan.share_of(list("abcdefgh"), rank)] for rank in range(2)]
    assert shares == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("num_layers", "num_chunks", "expected"),
    [
        (80, 4, (20, 20, 20, 20)),
        (94, 4, (23, 24, 24, 23)),
        (61, 4, (14, 16, 16, 15)),
        (61, 8, (6, 8, 8, 8, 8, 8, 8, 7)),
        (5, 4, (1, 1, 1, 2)),
        (4, 3, (1, 2, 1)),
        (3, 2, (1, 2)),
    ],
)
def test_uneven_stages_count_embedding_and_output_layer(num_layers, num_chunks, expected):
    assert balanced_layers(num_layers, num_chunks) == expected


@given(num_layers=st.integers(1, 200), num_chunks=st.integers(1, 64))
def test_layers_are_all_given_out_and_no_chunk_is_empty_or_much_larger(num_layers, num_chunks):
    assume(num_layers >= num_chunks)
    layers = balanced_layers(num_layers, num_chunks)
    assert len(layers) == num_chunks
    assert sum(layers) == num_layers
    assert min(layers) >= 1
    assert max(layers) - min(layers) <= 2


def test_a_layout_names_its_layers_only_where_they_differ():
    assert plan(3, "parallel.pp=3", "rollout.prompts_per_step=3").layers is None
    assert plan(4, "parallel.pp=4").layers == (7, 8, 8, 7)
    assert plan(2, "parallel.pp=2", "parallel.layers_per_chunk=[14,16]").layers == (14, 16)
    assert "layers 14 16" in plan(2, "parallel.pp=2", "parallel.layers_per_chunk=[14,16]").describe()
