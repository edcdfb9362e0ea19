"""The log-prob kernel and the sampler with the vocabulary split over 2 and 4 ranks: values and gradients in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

VOCAB, PADDED, HIDDEN, TOKENS = 37, 40, 16, 13


def inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=generator, dtype=torch.float64)
    weight[VOCAB:] = 1e3  # padding that would dominate if it took part
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, upstream


def kernel_on_a_shard(temperature: float, max_logits: int):
    """(log-probs, entropy and certainty, gradient of hidden, gradient of this rank's rows)."""
    import torch.distributed as dist

    from megatron_powerflow.objective.token_log_probs import token_statistics

    dist.init_process_group("gloo")
    try:
        hidden, weight, targets, upstream = inputs()
        rows = PADDED // dist.get_world_size()
        shard = weight[dist.get_rank() * rows :][:rows].clone().requires_grad_()
        hidden.requires_grad_()
        log_probs, entropy, certainty = token_statistics(
            hidden,
            shard,
            targets,
            tp_group=dist.group.WORLD,
            vocab_size=VOCAB,
            temperature=temperature,
            max_logits=max_logits,
        )
        (upstream @ log_probs + upstream.flip(0) @ entropy).backward()
        values = torch.stack([log_probs, entropy, certainty]).detach().numpy()
        return values, hidden.grad.numpy(), shard.grad.numpy()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(("temperature", "max_logits"), [(1.0, 512), (0.7, 5)])
def test_values_and_gradients_equal_full_logits(gloo, tp, temperature, max_logits):
    hidden, weight, targets, upstream = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight[:VOCAB].t() / temperature
    every = logits.log_softmax(-1)
    log_probs = every.gather(1, targets[:, None]).squeeze(1)
    entropy, certainty = -(every.exp() * every).sum(-1), logits.logsumexp(-1) - logits.mean(-1)
    (upstream @ log_probs + upstream.flip(0) @ entropy).backward()
    values = torch.stack([log_probs, entropy, certainty]).detach().numpy()
    answers = gloo.run(tp, kernel_on_a_shard, temperature, max_logits)
    for ours, grad_hidden, _ in answers:  # complete and equal on every rank
        np.testing.assert_allclose(ours, values, rtol=1e-10)
        np.testing.assert_allclose(grad_hidden, hidden.grad.numpy(), rtol=1e-8, atol=1e-10)
    grad_weight = np.concatenate([answer[2] for answer in answers])
    np.testing.assert_allclose(grad_weight, weight.grad.numpy(), rtol=1e-8, atol=1e-10)


def sample_on_a_shard(greedy: bool):
    import torch.distributed as dist

    from megatron_powerflow.rollout.sampling import sample_tokens

    dist.init_process_group("gloo")
    try:
        generator = torch.Generator().manual_seed(2)
        logits = torch.randn(500, PADDED, generator=generator) * 3
        logits[:, VOCAB:] = -torch.inf
        logits[0, 5] = logits[0, 30] = 50.0  # a tie across ranks
        uniform = torch.rand(500, generator=generator, dtype=torch.float64)
        uniform[1], uniform[2] = 0.0, 1.0 - 1e-16
        columns = PADDED // dist.get_world_size()
        first = dist.get_rank() * columns
        shard = logits[:, first : first + columns].contiguous()
        tokens, log_probs = sample_tokens(shard, None if greedy else uniform, tp_group=dist.group.WORLD, first=first)
        return tokens.numpy(), log_probs.numpy()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_every_rank_draws_the_token_that_one_rank_would(gloo, tp, greedy):
    ((tokens, log_probs),) = gloo.run(1, sample_on_a_shard, greedy)
    assert (tokens < VOCAB).all()
    for ours, ours_log_probs in gloo.run(tp, sample_on_a_shard, greedy):
        np.testing.assert_array_equal(ours, tokens)
        np.testing.assert_allclose(ours_log_probs, log_probs, atol=1e-6)
