"""The log-prob kernel on one rank: values and gradients against full logits, in fp64. More ranks: tests/distributed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_powerflow.objective.token_log_probs import token_log_probs, token_statistics


@pytest.fixture(scope="module")
def alone():
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def case(num_tokens: int, vocab_size: int, padded: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, 16, generator=generator, dtype=dtype)
    weight = torch.randn(padded, 16, generator=generator, dtype=dtype)
    targets = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return hidden, weight, targets


def plain(hidden, weight, targets, vocab_size: int, temperature: float):
    logits = (hidden @ weight[:vocab_size].t()) / temperature
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("max_logits", [1, 5, 512])
@pytest.mark.parametrize(("vocab_size", "padded"), [(37, 37), (37, 48)])
def test_values_and_gradients_equal_full_logits(alone, temperature, max_logits, vocab_size, padded):
    hidden, weight, targets = case(11, vocab_size, padded)
    upstream = torch.randn(11, dtype=torch.float64)
    results = []
    for kernel in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if kernel:
            values = token_log_probs(
                h,
                w,
                targets,
                tp_group=alone,
                vocab_size=vocab_size,
                temperature=temperature,
                max_logits=max_logits,
            )
        else:
            values = plain(h, w, targets, vocab_size, temperature)
        values.backward(upstream)
        results.append((values.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (results[0][2][vocab_size:] == 0).all()  # padding rows never move


def test_gradcheck(alone):
    hidden, weight, targets = case(4, 7, 9)

    def function(h, w):
        return token_log_probs(h, w, targets, tp_group=alone, vocab_size=7, temperature=0.9, max_logits=6)

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


def test_log_probs_are_fp32_and_at_most_0(alone):
    hidden, weight, targets = case(64, 37, 37, dtype=torch.bfloat16)
    values = token_log_probs(20 * hidden, weight, targets, tp_group=alone, vocab_size=37, temperature=1.0)
    assert values.dtype == torch.float32
    assert values.max() <= 1e-6
    assert values.isfinite().all()


def test_no_tokens_no_values(alone):
    hidden, weight, targets = case(0, 37, 37)
    assert token_log_probs(hidden, weight, targets, tp_group=alone, vocab_size=37, temperature=1.0).shape == (0,)


@pytest.mark.parametrize("max_logits", [5, 512])
@pytest.mark.parametrize(("vocab_size", "padded"), [(37, 37), (37, 48)])
def test_entropy_and_certainty_equal_full_logits(alone, max_logits, vocab_size, padded):
    hidden, weight, targets = case(11, vocab_size, padded)
    weight[vocab_size:] = 50.0  # padding that would dominate if it took part
    upstream = torch.randn(2, 11, dtype=torch.float64)
    results = []
    for kernel in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if kernel:
            arguments = {"tp_group": alone, "vocab_size": vocab_size, "temperature": 0.8, "max_logits": max_logits}
            log_probs, entropy, certainty = token_statistics(h, w, targets, **arguments)
            torch.testing.assert_close(log_probs, token_log_probs(h, w, targets, **arguments), rtol=0, atol=0)
        else:
            logits = h @ w[:vocab_size].t() / 0.8
            every = logits.log_softmax(-1)
            log_probs = every.gather(1, targets[:, None]).squeeze(1)
            entropy, certainty = -(every.exp() * every).sum(-1), (logits.logsumexp(-1) - logits.mean(-1)).detach()
        assert not certainty.requires_grad
        (upstream[0] @ log_probs + upstream[1] @ entropy).backward()
        results.append((log_probs.detach(), entropy.detach(), certainty, h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_certainty_is_the_divergence_of_the_uniform_distribution(alone):
    """KL(Uniform || p) = certainty - log V (Intuitor, arXiv 2505.19590)."""
    hidden, weight, targets = case(11, 37, 37)
    certainty = token_statistics(hidden, weight, targets, tp_group=alone, vocab_size=37, temperature=1.0).certainty
    log_p = (hidden @ weight.t()).log_softmax(-1)
    uniform = torch.full_like(log_p, 1 / 37)
    divergence = (uniform * (uniform.log() - log_p)).sum(-1)
    torch.testing.assert_close(certainty - torch.tensor(37.0, dtype=torch.float64).log(), divergence)
