"""The log Z' head in a checkpoint: comes back to the last bit; one that Adam moved, or of another kind, is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_powerflow.checkpoint.folder import HEAD_NAME
from megatron_powerflow.checkpoint.saving import head_tensors, save_head
from megatron_powerflow.checkpoint.storage import _load_head
from megatron_powerflow.errors import UserError
from megatron_powerflow.model.log_z_head import LogZHead


def new(kind: str = "mlp", seed: int = 0) -> LogZHead:
    return LogZHead(8, kind=kind, detach=True, seed=seed)


def moved(kind: str = "mlp") -> LogZHead:
    """After an update on prompts that it was centred by."""
    one, pool = new(kind), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    one.calibrate(-0.9)
    if kind == "mlp":
        one.centre(pool, lambda values: values.mean(dim=0))
    one.rate = 0.5
    (one(pool) - torch.linspace(-2, 0, 6)).square().mean().backward()
    one.step(1.0)
    return one


@pytest.mark.parametrize("kind", ["mlp", "scalar"])
def test_it_comes_back_to_the_last_bit(tmp_path, kind):
    one, other = moved(kind), new(kind, seed=1)
    save_head(tmp_path / HEAD_NAME, head_tensors(one))
    _load_head(tmp_path / HEAD_NAME, other)
    saved, loaded = one.state_dict(), other.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    pool = torch.randn(3, 8)
    assert torch.equal(one(pool), other(pool))


def test_a_head_that_adam_moved_is_refused_with_what_to_do(tmp_path):
    save_head(tmp_path / HEAD_NAME, head_tensors(moved()))
    tensors = load_file(tmp_path / HEAD_NAME)
    save_file(tensors | {"adam.exp_avg.last.bias": torch.zeros(1)}, tmp_path / HEAD_NAME)
    with pytest.raises(UserError, match=r"earlier version.*start anew from its export"):
        _load_head(tmp_path / HEAD_NAME, new())


def test_a_head_of_another_kind_is_refused(tmp_path):
    save_head(tmp_path / HEAD_NAME, head_tensors(moved("scalar")))
    with pytest.raises(UserError, match="does not hold the log Z' head of this run"):
        _load_head(tmp_path / HEAD_NAME, new())
