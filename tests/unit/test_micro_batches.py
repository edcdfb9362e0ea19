"""A step's rollouts become micro-batches as the config says: padded or packed, by updates, groups whole where asked."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_powerflow.config import PrecisionSection
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.training import micro_batches
from megatron_powerflow.training.micro_batches import bin_rule, pack_updates, padded_multiple
from megatron_powerflow.training.staleness import SampledBy
from tests.unit.test_config import MINIMAL
from tests.unit.test_layout import ARCHITECTURE

PACKED = "parallel.max_tokens_per_micro_batch=24"
PADDED = "parallel.micro_batch_size=4"
GROUP = 2


def plan(*overrides: str, sampled_by: SampledBy = SampledBy.OWN, **sizes):
    layout = Layout(**{"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "dp": 1, "sequence_parallel": False} | sizes)
    small = [f"rollout.responses_per_prompt={GROUP}", "precision.dtype=fp32"]
    return SimpleNamespace(
        config=parse_config(MINIMAL, [*small, *overrides]),
        layout=layout,
        architecture=ARCHITECTURE,
        tokenizer=SimpleNamespace(decode=lambda token_ids: ""),
        sampled_by=sampled_by,
    )


def session():
    groups = SimpleNamespace(device=torch.device("cpu"), cp_rank=0, cp_size=1, dp_rank=0, dp_size=1)
    return SimpleNamespace(groups=groups)


def rollouts(num_groups: int = 4, reason: str = "eos") -> list[Rollout]:
    """Prompts of 8 tokens, responses of 2 and 3."""
    return [
        Rollout(Prompt(str(q), q, (1,) * 8), q, i, (5,) * (2 + i), (-1.0,) * (2 + i), reason)
        for q in range(num_groups)
        for i in range(GROUP)
    ]


def slots(updates) -> list[list[int]]:
    """The groups of each update, one entry per response."""
    return [sorted(slot for batch in batches for slot in batch.group.tolist()) for batches in updates]


@pytest.mark.parametrize("packed", [[], [PACKED], [PADDED]])
def test_each_update_takes_its_share_of_whole_groups(packed):
    updates = pack_updates(rollouts(), plan("optimizer.updates_per_rollout=2", *packed), session(), 0)
    assert slots(updates) == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert slots(pack_updates(rollouts(), plan(*packed), session(), 0)) == [[0, 0, 1, 1, 2, 2, 3, 3]]


@pytest.mark.parametrize("packed", [[], [PACKED], [PADDED]])
@pytest.mark.parametrize(("truncated", "kept"), [("drop", False), ("keep", True)])
def test_responses_that_are_cut_are_dropped_where_the_config_says_so(packed, truncated, kept):
    cut = rollouts(reason="length")
    for batches in pack_updates(cut, plan(f"objective.truncated={truncated}", *packed), session(), 0):
        assert all(bool((batch.kept == kept).all()) for batch in batches)


def test_prompts_count_in_the_budget():
    """21 tokens a group of 24: one group in a micro-batch, two of the responses alone would be 10."""
    (batches,) = pack_updates(rollouts(), plan(PACKED), session(), 0)
    assert [batch.stream.num_positions for batch in batches] == [21] * 4


@pytest.mark.parametrize(
    ("overrides", "whole"),
    [
        ([PACKED], True),
        ([PACKED, "objective.log_z=loo"], True),
        ([PACKED, "objective.log_z=mlp"], False),
        ([PACKED, "objective.preset=grpo"], False),
        (["parallel.max_tokens_per_micro_batch=20"], False),  # no room for a group of 21
        ([], True),
        ([PADDED], False),
    ],
)
def test_groups_are_whole_in_a_micro_batch_where_log_z_is_theirs_and_there_is_room(overrides, whole):
    (batches,) = pack_updates(rollouts(), plan(*overrides), session(), 0)
    assert {batch.whole_groups for batch in batches} == {whole}


def test_by_default_a_step_of_short_responses_is_one_pass_and_a_pipeline_has_more():
    (batches,) = pack_updates(rollouts(64), plan(), session(), 0)
    assert [len(batch.tokens) for batch in batches] == [128]
    (batches,) = pack_updates(rollouts(64), plan("parallel.pp=2", pp=2), session(), 0)
    assert [len(batch.tokens) for batch in batches] == [16] * 8
    (batches,) = pack_updates(rollouts(64), plan(PADDED), session(), 0)
    assert [len(batch.tokens) for batch in batches] == [4] * 32


def test_interleaved_pipelines_get_micro_batches_of_one_shape_and_a_multiple_of_pp():
    config = plan(PACKED).config
    rule = bin_rule(Layout(2, 3, 2, 2, 1, 1, sequence_parallel=True), config)
    assert (rule.max_tokens, rule.sequence_multiple, rule.total_multiple, rule.count_multiple) == (24, 4, 4, 3)
    assert bin_rule(Layout(1, 3, None, 1, 1, 1, sequence_parallel=False), config).count_multiple == 1
    uneven = [*rollouts(), *(Rollout(Prompt("9", 9, (1,)), 4, i, (5,), (-1.0,), "eos") for i in range(GROUP))]
    for overrides in (["parallel.micro_batch_size=2"], [PACKED]):
        shapes = []
        for vpp in (None, 2):
            (batches,) = pack_updates(uneven, plan("parallel.pp=2", *overrides, pp=2, vpp=vpp), session(), 0)
            shapes.append({batch.stream.num_positions if batch.stream else batch.tokens.shape[1] for batch in batches})
        assert len(shapes[0]) > 1
        assert len(shapes[1]) == 1


def test_on_cuda_padded_micro_batches_have_few_lengths(monkeypatch):
    cpu, cuda, bf16 = torch.device("cpu"), torch.device("cuda"), PrecisionSection(dtype="bf16")
    fp8 = PrecisionSection(dtype="fp8", fp8_recipe="mxfp8")
    whole, split = (Layout(tp, 1, None, cp, 1, 1, sequence_parallel=True) for tp, cp in ((1, 1), (8, 3)))
    assert (padded_multiple(whole, bf16, cpu), padded_multiple(whole, bf16, cuda)) == (1, 128)
    assert (padded_multiple(split, bf16, cpu), padded_multiple(split, bf16, cuda)) == (24, 384)
    assert padded_multiple(split, fp8, cpu) == padded_multiple(split, fp8, cuda) == 768
    monkeypatch.setattr(micro_batches, "length_step", lambda device: 128)
    (batches,) = pack_updates(rollouts(), plan(PADDED), session(), 0)
    assert {batch.tokens.shape[1] for batch in batches} == {128}


@pytest.mark.parametrize("how", [PACKED, PADDED])
def test_the_lag_of_a_rollout_comes_with_it(how):
    """Of step 5: the first response has a token by step 3's weights; of another run's policy there is no lag."""
    first, *others = rollouts()
    size = len(first.response_token_ids)
    older = [replace(first, weight_versions=((3, 0, 1), (5, 1, size))), *others]

    def lags(sampled_by: SampledBy) -> list[list[float]]:
        (batches,) = pack_updates(older, plan(how, sampled_by=sampled_by), session(), 5)
        rows = [(int(i), lag) for b in batches for i, lag in zip(b.rollout_index, b.lag.tolist(), strict=True)]
        return [lag for _, lag in sorted(rows)]

    assert size > 1
    assert lags(SampledBy.OLDER) == [[2, 2, 2], *[[0, 0, 1]] * len(others)]
    assert all(math.isnan(number) for lag in lags(SampledBy.ANOTHER) for number in lag)
