"""The log-prob kernel and the sampler with the vocabulary split over 2 and 4 ranks: values and gradients in fp64,
output weights tied to the embedding included."""

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

    from megatron_powerflow.log_probs.token_log_probs import token_statistics

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


def tied(weight: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
    """What lies between embedding and output: hidden states that are no linear function of the weight."""
    inner = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)
    return (embedded @ inner / HIDDEN).tanh()


def tied_on_a_shard(sequence_parallel: bool):
    """Gradient of this rank's rows, which are embedding and output weight at once, by Megatron's own mappings."""
    import torch.distributed as dist
    from megatron.core import tensor_parallel

    from megatron_powerflow.log_probs.token_log_probs import token_log_probs

    dist.init_process_group("gloo")
    try:
        group = dist.group.WORLD
        _, weight, tokens, upstream = inputs()
        rows = PADDED // dist.get_world_size()
        shard = weight[dist.get_rank() * rows :][:rows].clone().requires_grad_()
        local = tokens[:-1] - dist.get_rank() * rows
        here = (local >= 0) & (local < rows)
        part = torch.nn.functional.embedding(torch.where(here, local, 0), shard) * here[:, None]
        if sequence_parallel:
            embedded = tensor_parallel.reduce_scatter_to_sequence_parallel_region(part, group=group)
            hidden = tied(weight, embedded)
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=group
            )
        else:
            hidden = tied(weight, tensor_parallel.reduce_from_tensor_model_parallel_region(part, group=group))
        found = token_log_probs(
            hidden, shard, tokens[1:], tp_group=group, vocab_size=VOCAB, temperature=0.7, max_logits=20
        )
        (upstream[1:] @ found).backward()
        return shard.grad.numpy()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
def test_tied_weights_get_both_gradients(gloo, tp, sequence_parallel):
    _, weight, tokens, upstream = inputs()
    weight.requires_grad_()
    logits = tied(weight, weight[tokens[:-1]]) @ weight[:VOCAB].t() / 0.7
    (upstream[1:] @ logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)).backward()
    grad = np.concatenate(gloo.run(tp, tied_on_a_shard, sequence_parallel))
    np.testing.assert_allclose(grad, weight.grad.numpy(), rtol=1e-8, atol=1e-10)


def choose_where_one_rank_errs():
    """Name of the arithmetic each rank settles on when that of the last rank is wrong."""
    import warnings
    from types import SimpleNamespace

    import torch.distributed as dist

    import megatron_powerflow.log_probs.plain as plain
    from megatron_powerflow.log_probs.kernel_choice import LogProbKernel

    dist.init_process_group("gloo")
    try:
        rank, calls = dist.get_rank(), []

        def shard_sums(*arguments):
            calls.append(arguments)
            maxima, sums = plain.shard_sums(*arguments)
            return maxima + (0.1 if rank == dist.get_world_size() - 1 else 0.0), sums

        other = SimpleNamespace(__name__="other", shard_sums=shard_sums, grad_logits=plain.grad_logits, FAILURES=())
        hidden, weight, targets, _ = inputs()
        rows = PADDED // dist.get_world_size()
        kernel = LogProbKernel(lambda hidden: other)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kernel.log_probs(
                hidden.float(),
                weight[rank * rows :][:rows].float(),
                targets,
                tp_group=dist.group.WORLD,
                vocab_size=VOCAB,
                temperature=1.0,
            )
        return len(calls), [str(warning.message) for warning in said]
    finally:
        dist.destroy_process_group()


def test_ranks_choose_alike_when_one_of_them_errs(gloo):
    for num_calls, said in gloo.run(2, choose_where_one_rank_errs):
        assert num_calls == 1  # judged, not used
        assert "plain path" in said[0]


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
