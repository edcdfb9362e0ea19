"""The fake GPU itself: what it knows, what it does not, and what it refuses. A fake that accepts everything proves
nothing."""

from __future__ import annotations

import pytest
import torch

from tests.fake_cuda.device import DeviceMismatch, FakeGpu, NoValue


@pytest.fixture
def gpu():
    with FakeGpu() as gpu:
        yield gpu


def test_tensors_are_on_cuda_and_say_so(gpu):
    weight = torch.empty(3, 4, device="cuda", dtype=torch.bfloat16)
    assert (str(weight.device), weight.is_cuda, weight.is_meta, weight.type()) == (
        "cuda:0",
        True,
        False,
        "torch.cuda.BFloat16Tensor",
    )
    assert torch.ones(2).to("cuda").device == torch.zeros(2, device=0).device == torch.device(0)
    assert not torch.ones(2).is_cuda


def test_the_backward_pass_stays_on_the_gpu(gpu):
    weight = torch.nn.Parameter(torch.empty(3, 4, device="cuda"))
    (torch.empty(5, 3, device="cuda") @ weight).square().sum().backward()
    assert weight.grad.is_cuda
    assert weight.grad.shape == (3, 4)


def test_values_from_the_host_are_kept_and_computed_with(gpu):
    tokens = torch.tensor([[5, 6, 7], [8, 9, 10]], device="cuda")
    mask = tokens > 6
    tokens[0, :2] = 1
    assert tokens.tolist() == [[1, 1, 7], [8, 9, 10]]
    assert mask.sum().item() == 4
    assert torch.cat([tokens, tokens]).cumsum(0)[:, 2].cpu().tolist() == [7, 17, 24, 34]
    unknown = torch.empty(2, 3, 16, device="cuda")
    assert unknown[mask].shape == (4, 16)
    assert mask.nonzero().tolist() == [[0, 2], [1, 0], [1, 1], [1, 2]]


def test_what_nobody_computed_has_no_integer(gpu):
    logits = torch.empty(4, 8, device="cuda")
    assert logits.sum().item() == 0.0  # a number
    assert torch.isfinite(logits).all()
    with pytest.raises(NoValue, match="the host reads int64"):
        logits.argmax(-1).tolist()
    with pytest.raises(NoValue, match="a mask selects"):
        logits[logits > 0]
    places = torch.arange(4, device="cuda")
    places[1:2] = logits.argmax().view(1)
    with pytest.raises(NoValue):
        places.tolist()


def test_the_host_waits_for_values_and_for_shapes_that_hang_on_them(gpu):
    tokens, mask = torch.tensor([5, 6, 7], device="cuda"), torch.tensor([True, False, True], device="cuda")
    tokens[mask] = 0
    tokens.sum().clamp(min=3)
    assert gpu.host_reads == 0
    assert tokens[mask].shape == (2,)
    assert gpu.host_reads == 1
    assert tokens.tolist() == [0, 6, 0]
    assert tokens.sum().item() == 6
    assert gpu.host_reads == 3


def test_host_and_gpu_do_not_mix(gpu):
    with pytest.raises(DeviceMismatch, match=r"float32 \[3\] on cuda, float32 \[3\] on cpu"):
        torch.empty(3, device="cuda") + torch.ones(3)
    assert (torch.empty(3, device="cuda") * torch.tensor(2.0)).is_cuda  # a number is no tensor, there as here


def test_bytes_are_those_of_storages_alive(gpu):
    weight = torch.empty(1000, 1000, device="cuda", dtype=torch.bfloat16)
    assert gpu.live_bytes == 2_000_000
    views = [weight[:10], weight.t(), weight.detach()]
    assert gpu.live_bytes == 2_000_000
    copy = weight.float()
    assert gpu.live_bytes == 6_000_000
    del weight, copy
    assert (gpu.live_bytes, gpu.peak_bytes) == (2_000_000, 6_000_000)
    views.clear()
    assert gpu.live_bytes == 0


def test_a_module_that_moves_keeps_the_marks_of_its_parameters(gpu):
    linear = torch.nn.Linear(3, 3)
    linear.weight.sequence_parallel = True
    assert linear.to("cuda").weight.is_cuda
    assert linear.weight.sequence_parallel
