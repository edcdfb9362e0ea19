"""Sampling on one rank: uniforms are a function of their names, tokens follow the distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_powerflow.data.prompts import PromptStream
from megatron_powerflow.random_streams import generator
from megatron_powerflow.records import Prompt, Purpose
from megatron_powerflow.rollout.sampling import sample_tokens, uniforms


@pytest.fixture(scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_uniforms_depend_on_every_name_and_on_nothing_else():
    names = {"seed": 1, "step": 2, "slot": 3, "response": 4}
    same = uniforms(**names, count=5)
    assert (uniforms(**names, count=9)[:5] == same).all()  # a longer limit changes no sample
    others = [uniforms(**names | {name: 9}, count=5) for name in names]
    everything = np.stack([same, *others])
    assert len(np.unique(everything)) == everything.size
    assert ((everything >= 0) & (everything < 1)).all()


def test_neighbouring_streams_do_not_overlap():
    """Philox counts in the low words; slot and response are in the high ones."""
    streams = [uniforms(seed=0, step=0, slot=slot, response=r, count=4096) for slot in range(4) for r in range(4)]
    assert len(np.unique(np.stack(streams))) == 16 * 4096


def test_no_two_purposes_share_a_number():
    """Epoch e's order and step e's first response had the same key and counter."""
    streams = [
        generator(purpose, seed=seed, index=index).random(512)
        for purpose in Purpose
        for seed in (0, 1)
        for index in (0, 1)
    ]
    assert len(np.unique(np.concatenate(streams))) == len(Purpose) * 4 * 512
    prompts = [Prompt(id=str(i), index=i, token_ids=(3,)) for i in range(50)]
    order = [prompt.index for prompt in PromptStream(prompts, seed=3, shuffle=True).take(50)]
    first_response = np.random.Generator(np.random.Philox(counter=[0, 0, 0, 0], key=[3, 0]))
    assert (uniforms(seed=3, step=0, slot=0, response=0, count=4) == first_response.random(4)).all()
    tied = np.random.Generator(np.random.Philox(counter=[0, 0, 0, 0], key=[3, 0])).permutation(50)
    assert order != tied.tolist()


def test_tokens_invert_the_cumulative_distribution(alone):
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log().expand(6, 4).contiguous()
    uniform = torch.tensor([0.0, 0.0999, 0.1001, 0.35, 0.65, 0.9999], dtype=torch.float64)
    tokens, log_probs = sample_tokens(logits.clone(), uniform, tp_group=alone, first=0)
    assert tokens.tolist() == [0, 0, 1, 2, 3, 3]
    torch.testing.assert_close(log_probs, logits[0][tokens])


def test_a_token_is_named_by_its_global_id(alone):
    """Column 0 of a shard is the token `first`."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    for uniform in (torch.tensor([0.5], dtype=torch.float64), None):
        tokens, log_probs = sample_tokens(logits.clone(), uniform, tp_group=alone, first=100)
        assert tokens.tolist() == [102 if uniform is not None else 103]
        torch.testing.assert_close(log_probs, logits[0, tokens - 100])


def test_logits_of_hundreds_are_sampled_as_small_ones(alone):
    logits, uniform = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log() + 500, torch.tensor([0.5], dtype=torch.float64)
    tokens, log_probs = sample_tokens(logits.clone(), uniform, tp_group=alone, first=0)
    assert tokens.tolist() == [2]
    torch.testing.assert_close(log_probs, torch.tensor([0.3]).log(), rtol=1e-3, atol=1e-3)


def test_impossible_tokens_are_never_drawn(alone):
    logits = torch.full((3, 6), -torch.inf)
    logits[:, 1] = logits[:, 3] = 0.0
    uniform = torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert sample_tokens(logits.clone(), uniform, tp_group=alone, first=0)[0].tolist() == [1, 3, 3]


def test_greedy_takes_the_most_likely_and_the_lowest_id_on_ties(alone):
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 0.0, 0.0, 0.0]])
    tokens, log_probs = sample_tokens(logits.clone(), None, tp_group=alone, first=0)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1))


def test_frequencies_follow_the_probabilities(alone):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 50, generator=generator)
    uniform = torch.from_numpy(uniforms(seed=0, step=0, slot=0, response=0, count=20_000))
    tokens, _ = sample_tokens(logits.repeat(20_000, 1), uniform, tp_group=alone, first=0)
    frequencies = torch.bincount(tokens, minlength=50) / 20_000
    assert float((frequencies - logits.softmax(-1)[0]).abs().sum() / 2) < 0.03


def test_a_large_vocabulary_is_inverted_as_in_fp64(alone):
    """150,001 tokens, nine tenths of the mass on the first: the tail keeps its place, to 1e-7 of the mass."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 150_001, generator=generator)
    logits[0, 0] = logits[0, 1:].logsumexp(0) + np.log(9.0)
    uniform = torch.from_numpy(uniforms(seed=0, step=0, slot=0, response=0, count=500))
    tokens, log_probs = sample_tokens(logits.repeat(500, 1), uniform, tp_group=alone, first=0)
    running = logits[0].double().softmax(0).cumsum(0)
    assert (tokens > 0).sum() > 20
    assert (running[tokens] > uniform - 1e-7).all()
    assert (running[(tokens - 1).clamp(min=0)] <= uniform + 1e-7)[tokens > 0].all()
    torch.testing.assert_close(log_probs, logits[0].double().log_softmax(0)[tokens].float())
    exact = torch.searchsorted(running, uniform, right=True)
    assert (tokens == exact).float().mean() > 0.99


def test_a_token_between_blocks_without_mass_is_found(alone):
    """Only the last column of one block and the first of a later one are possible."""
    logits = torch.full((4, 1000), -torch.inf)
    logits[:, 127] = logits[:, 512] = 0.0
    uniform = torch.tensor([0.0, 0.4999, 0.5, 1 - 1e-16], dtype=torch.float64)
    assert sample_tokens(logits.clone(), uniform, tp_group=alone, first=0)[0].tolist() == [127, 127, 512, 512]


def test_a_model_that_blew_up_draws_a_token_that_exists(alone):
    """NaN logits, the last columns being padding: the run is to end with the reason, not with a broken micro-batch."""
    logits = torch.full((2, 300), torch.nan)
    logits[:, 290:] = -torch.inf
    for uniform in (torch.tensor([0.0, 0.999], dtype=torch.float64), None):
        tokens, log_probs = sample_tokens(logits.clone(), uniform, tp_group=alone, first=0)
        assert tokens.tolist() == [0, 0]
        assert log_probs.isnan().all()
