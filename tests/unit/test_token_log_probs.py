"""The log-prob kernel on one rank: values and gradients against full logits, in fp64. More ranks: tests/distributed."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_powerflow.log_probs.plain as plain_arithmetic
from megatron_powerflow.log_probs.kernel_choice import LogProbKernel
from megatron_powerflow.log_probs.token_log_probs import token_log_probs, token_statistics


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


def capped(logits, softcap: float | None):
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def plain(hidden, weight, targets, vocab_size: int, temperature: float, softcap: float | None = None):
    logits = capped(hidden @ weight[:vocab_size].t(), softcap) / temperature
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (2.0, None), (1.0, 3.0), (0.7, 5.0)])
@pytest.mark.parametrize("max_logits", [1, 5, 512])
@pytest.mark.parametrize(("vocab_size", "padded"), [(37, 37), (37, 48)])
def test_values_and_gradients_equal_full_logits(alone, temperature, softcap, max_logits, vocab_size, padded):
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
                softcap=softcap,
                max_logits=max_logits,
            )
        else:
            values = plain(h, w, targets, vocab_size, temperature, softcap)
        values.backward(upstream)
        results.append((values.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (results[0][2][vocab_size:] == 0).all()  # padding rows never move


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(alone, softcap):
    hidden, weight, targets = case(4, 7, 9)
    arguments = {"tp_group": alone, "vocab_size": 7, "temperature": 0.9, "softcap": softcap, "max_logits": 6}

    def function(h, w):
        return token_log_probs(h, w, targets, **arguments)

    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


def test_log_probs_are_fp32_and_at_most_0(alone):
    hidden, weight, targets = case(64, 37, 37, dtype=torch.bfloat16)
    values = token_log_probs(20 * hidden, weight, targets, tp_group=alone, vocab_size=37, temperature=1.0)
    assert values.dtype == torch.float32
    assert values.max() <= 1e-6
    assert values.isfinite().all()


def test_in_bf16_the_weight_has_its_gradient(alone):
    """That of full logits in fp32, up to rounding."""
    hidden, weight, targets = case(11, 37, 48, dtype=torch.bfloat16)
    weight.requires_grad_()
    arguments = {"tp_group": alone, "vocab_size": 37, "temperature": 1.0, "max_logits": 20}
    token_log_probs(hidden, weight, targets, **arguments).sum().backward()
    exact = weight.detach().float().requires_grad_()
    plain(hidden.float(), exact, targets, 37, 1.0).sum().backward()
    torch.testing.assert_close(weight.grad.float(), exact.grad, rtol=0.05, atol=0.05)
    assert exact.grad.abs().max() > 0.5


def test_no_tokens_no_values(alone):
    hidden, weight, targets = case(0, 37, 37)
    assert token_log_probs(hidden, weight, targets, tp_group=alone, vocab_size=37, temperature=1.0).shape == (0,)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("max_logits", [5, 512])
@pytest.mark.parametrize(("vocab_size", "padded"), [(37, 37), (37, 48)])
def test_entropy_and_certainty_equal_full_logits(alone, max_logits, vocab_size, padded, softcap):
    hidden, weight, targets = case(11, vocab_size, padded)
    weight[vocab_size:] = 50.0  # padding that would dominate if it took part
    upstream = torch.randn(2, 11, dtype=torch.float64)
    results = []
    for kernel in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if kernel:
            sizes = {"vocab_size": vocab_size, "max_logits": max_logits}
            arguments = {"tp_group": alone, "temperature": 0.8, "softcap": softcap, **sizes}
            log_probs, entropy, certainty = token_statistics(h, w, targets, **arguments)
            torch.testing.assert_close(log_probs, token_log_probs(h, w, targets, **arguments), rtol=0, atol=0)
        else:
            logits = capped(h @ w[:vocab_size].t(), softcap) / 0.8
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


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation hands out, per dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in self.given:
                self.largest[tensor.dtype] = max(self.largest.get(tensor.dtype, 0), tensor.numel())
        return answer

    def watch(self, *given: torch.Tensor) -> Sizes:
        """Leave out the inputs, of which operations hand out views."""
        self.given = {tensor.data_ptr() for tensor in given}
        return self


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_but_the_weights_gradient_grows_with_the_vocabulary(alone, dtype, everything):
    """And in bf16 there is no copy of that gradient in fp32."""
    function = token_statistics if everything else token_log_probs
    for vocab_size in (1000, 4000):
        hidden, weight, targets = case(64, vocab_size, vocab_size, dtype=dtype)
        hidden.requires_grad_(), weight.requires_grad_()
        with Sizes().watch(hidden, weight) as sizes:
            found = function(
                hidden, weight, targets, tp_group=alone, vocab_size=vocab_size, temperature=0.7, max_logits=2048
            )
            (found.log_probs + found.entropy if everything else found).sum().backward()
        grown = {**sizes.largest}
        assert grown.pop(dtype) == weight.numel()  # of 64 * vocab_size logits
        assert grown.pop(torch.float32, 0) <= 2048
        assert all(size <= 2048 for size in grown.values())


def test_a_gradient_that_nobody_asks_for_is_not_computed(alone):
    hidden, weight, targets = case(11, 37, 48)
    arguments = {"tp_group": alone, "vocab_size": 37, "temperature": 0.7}
    both = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    token_log_probs(*both, targets, **arguments).sum().backward()
    for number in range(2):
        inputs = [hidden.clone(), weight.clone()]
        inputs[number].requires_grad_()
        token_log_probs(*inputs, targets, **arguments).sum().backward()
        torch.testing.assert_close(inputs[number].grad, both[number].grad, rtol=0, atol=0)
        assert inputs[1 - number].grad is None
    with Sizes().watch(weight) as sizes:
        token_log_probs(both[0], weight, targets, **arguments).sum().backward()
    assert sizes.largest[torch.float64] < weight.numel()


def test_a_target_outside_the_vocabulary_is_an_error(alone):
    hidden, weight, targets = case(11, 37, 48)
    for wrong in (37, 47, -1):
        targets[3] = wrong
        with pytest.raises(RuntimeError, match="not in the vocabulary of 37"):
            token_log_probs(hidden, weight, targets, tp_group=alone, vocab_size=37, temperature=1.0)


def arithmetic_with(**changes) -> SimpleNamespace:
    """The plain arithmetic but for `changes`, under a name of its own."""
    functions = {name: getattr(plain_arithmetic, name) for name in ("shard_sums", "grad_logits", "FAILURES")}
    return SimpleNamespace(__name__="other", **functions | changes)


def lower_maxima(*arguments):
    maxima, sums = plain_arithmetic.shard_sums(*arguments)
    return maxima - 20.0, sums


def test_a_log_prob_above_0_stops_the_run(alone):
    """verl #2656: fused log-probs reached +123."""
    hidden, weight, targets = case(11, 37, 37)
    broken = arithmetic_with(shard_sums=lower_maxima)
    with pytest.raises(RuntimeError, match="above 0"):
        token_log_probs(hidden, weight, targets, tp_group=alone, vocab_size=37, temperature=1.0, arithmetic=broken)


def deaf_to_the_temperature(hidden, weight, columns, temperature, *rest):
    return plain_arithmetic.shard_sums(hidden, weight, columns, 1.0, *rest)


def without_the_target(hidden, weight, temperature, columns, *rest, softcap):
    columns = torch.full_like(columns, -1)
    return plain_arithmetic.grad_logits(hidden, weight, temperature, columns, *rest, softcap=softcap)


def without_entropy(hidden, weight, temperature, columns, log_normaliser, grad, *_, softcap):
    return plain_arithmetic.grad_logits(hidden, weight, temperature, columns, log_normaliser, grad, softcap=softcap)


def deaf_to_the_cap(*arguments, softcap):
    return plain_arithmetic.grad_logits(*arguments)


def not_a_number(*arguments, softcap):
    return plain_arithmetic.grad_logits(*arguments, softcap=softcap) * torch.nan


def does_not_compile(*_):
    raise NotImplementedError("no such instruction")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {"shard_sums": lower_maxima},
        {"shard_sums": deaf_to_the_temperature},
        {"grad_logits": without_the_target},
        {"grad_logits": without_entropy},
        {"grad_logits": deaf_to_the_cap},
        {"grad_logits": not_a_number},
        {"shard_sums": does_not_compile, "FAILURES": (NotImplementedError,)},
    ],
    ids=lambda changes: next(iter(changes.values())).__name__,
)
def test_an_arithmetic_that_errs_on_the_first_batch_is_not_used_and_that_is_said(alone, changes, dtype):
    hidden, weight, targets = case(11, 37, 48, dtype=dtype)
    arguments = {"tp_group": alone, "vocab_size": 37, "temperature": 0.7, "softcap": 6.0}
    kernel = LogProbKernel(lambda hidden: arithmetic_with(**changes))
    with pytest.warns(RuntimeWarning, match="by the plain path: other differs"):
        found = kernel.log_probs(hidden, weight, targets, **arguments)
    torch.testing.assert_close(found, token_log_probs(hidden, weight, targets, **arguments), rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, decided once
        kernel.statistics(hidden, weight, targets, **arguments)


def test_an_arithmetic_that_agrees_on_the_first_batch_is_used(alone):
    """The first batch that has tokens; rounding in bf16, against the plain arithmetic in fp32, is agreement."""
    calls = []

    def more_accurate(hidden, *arguments):
        calls.append(len(hidden))
        return plain_arithmetic.shard_sums(hidden.float(), *arguments)

    kernel = LogProbKernel(lambda hidden: arithmetic_with(shard_sums=more_accurate, grad_logits=in_fp32))
    hidden, weight, targets = case(11, 37, 48, dtype=torch.bfloat16)
    arguments = {"tp_group": alone, "vocab_size": 37, "temperature": 0.7}
    kernel.log_probs(hidden[:0], weight, targets[:0], **arguments)
    assert calls == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.log_probs(hidden, weight, targets, **arguments)
        kernel.log_probs(hidden[:5], weight, targets[:5], **arguments)
    assert calls == [11, 11, 5]  # judged, used, used


def in_fp32(hidden, *arguments, softcap):
    return plain_arithmetic.grad_logits(hidden.float(), *arguments, softcap=softcap).to(hidden.dtype)
