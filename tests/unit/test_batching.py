"""How much of a step goes through the model at a time: packed by a budget that follows from the lengths, or padded."""

from __future__ import annotations

import pytest

from megatron_powerflow.config_file import dump_config, parse_config
from megatron_powerflow.parallel.batching import (
    FEWEST_TOKENS,
    MOST_TOKENS,
    batching_line,
    fewest_micro_batches,
    padded_rows,
    token_budget,
)
from megatron_powerflow.parallel.layout import Layout, plan_layout
from tests.unit.test_config import MINIMAL
from tests.unit.test_layout import ARCHITECTURE

ONE = Layout(1, 1, None, 1, 1, 1, sequence_parallel=False)
PADDED, BUDGET = "parallel.micro_batch_size=3", "parallel.max_tokens_per_micro_batch=5000"


def config(*overrides: str, prompt: int = 24, response: int = 1000):
    lengths = [f"rollout.max_prompt_tokens={prompt}", f"rollout.max_response_tokens={response}"]
    return parse_config(MINIMAL, [*lengths, *overrides])


@pytest.mark.parametrize(
    ("longest", "budget"),
    [(8, 2048), (256, 2048), (512, 2048), (513, 2052), (1024, 4096), (4096, 16384), (9000, 16384), (32768, 32768)],
)
def test_the_default_budget_follows_from_the_longest_rollout(longest, budget):
    assert token_budget(config(prompt=4, response=longest - 4), ONE) == budget
    assert budget >= FEWEST_TOKENS
    assert longest <= budget <= max(MOST_TOKENS, longest)


def test_the_longest_rollout_has_room_with_the_padding_of_every_layout():
    split = Layout(4, 1, None, 5, 1, 1, sequence_parallel=True)
    settings = ["parallel.cp=5", "parallel.tp=4", "parallel.sequence_parallel=true"]
    assert token_budget(config(*settings, response=20000), split) == 20040  # 20,024 in multiples of 5 * 4
    fp8 = [*settings, "precision.dtype=fp8", "precision.fp8_recipe=mxfp8"]
    assert token_budget(config(*fp8, response=20000), split) == 20480  # of 5 * 4 * 32


def test_the_users_number_is_the_budget_and_the_users_rows_have_none():
    assert token_budget(config(BUDGET), ONE) == 5000
    assert token_budget(config(PADDED), ONE) is None


def test_a_pipeline_does_not_run_dry_by_default():
    stages = Layout(1, 3, None, 1, 1, 1, sequence_parallel=False)
    assert fewest_micro_batches(config(), ONE) == 1
    assert fewest_micro_batches(config("parallel.pp=3"), stages) == 12
    assert fewest_micro_batches(config("parallel.pp=3", BUDGET), stages) == 1


def test_where_nothing_packs_as_many_rows_go_as_the_budget_holds():
    assert padded_rows(config(PADDED), ONE) == 3
    assert padded_rows(config(), ONE) == 4
    assert padded_rows(config(BUDGET, response=2000), ONE) == 2
    assert padded_rows(config(response=40000), ONE) == 1
    assert padded_rows(config("parallel.max_tokens_per_micro_batch=100"), ONE) == 1  # refused in training, not here


def test_packing_is_the_default_and_nothing_of_the_default_is_written_down():
    """A run's own config.yaml leaves it open, too, by which a run that began padded is told apart (`resume.py`)."""
    parallel = config().parallel
    assert (parallel.micro_batch_size, parallel.max_tokens_per_micro_batch) == (None, None)
    assert "micro_batch" not in dump_config(config())
    # any number of rollouts can be packed, where padded ones must come in whole micro-batches
    odd = ("rollout.responses_per_prompt=3", "rollout.prompts_per_step=1")
    assert plan_layout(config(*odd), ARCHITECTURE, 1).dp == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "up to 4,096 tokens a micro-batch, from the longest rollout"),
        (["parallel.pp=3"], "4,096 tokens a micro-batch, and 12 or more of them for 3 pipeline stages, from the"),
        ([BUDGET], "up to 5,000 tokens a micro-batch"),
        ([PADDED], "3 rollouts a micro-batch, padded to the longest"),
    ],
)
def test_the_line_of_check(overrides, words):
    settings = config(*overrides)
    line = batching_line(settings, Layout(1, settings.parallel.pp, None, 1, 1, 1, sequence_parallel=False))
    assert words in line
    assert ("longest rollout;" in line) == (overrides not in ([BUDGET], [PADDED]))
