"""The log Z' head: starts at the calibrated constant, reads the prompt alone, never reaches the policy unasked, and
takes the share of the residuals that it is told, at any width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_powerflow.model.log_z_head import NUM_FEATURES, LogZHead, pool_prompt


def head_of(hidden_size: int, kind: str = "mlp", *, detach: bool = True, seed: int = 0) -> LogZHead:
    return LogZHead(hidden_size, kind=kind, detach=detach, seed=seed)


def prompt_states(num_prompts: int, hidden_size: int, spread: float = 0.2) -> Tensor:
    """Nearly parallel, as those of a model are: cosine about 1 / (1 + spread^2)."""
    generator = torch.Generator().manual_seed(hidden_size)
    shared = torch.randn(1, hidden_size, generator=generator)
    return 3.0 * (shared + spread * torch.randn(num_prompts, hidden_size, generator=generator))


def calibrated(pool: Tensor, log_z: float = -0.9, rate: float = 0.5) -> LogZHead:
    head = head_of(pool.shape[1])
    head.calibrate(log_z)
    head.centre(pool, lambda values: values.double().mean(dim=0))
    head.rate = rate
    return head


def update(head: LogZHead, pool: Tensor, wanted: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """One update on residuals log_z - wanted; returns them."""
    head.zero_grad()
    residual = head(pool) - wanted
    weight = torch.as_tensor(weight).expand_as(residual)
    (weight * residual.square()).mean().backward()
    head.step(float(weight.mean()))
    return residual.detach()


@pytest.mark.parametrize("kind", ["mlp", "scalar"])
def test_it_starts_at_the_calibrated_value_for_every_prompt(kind):
    head = head_of(8, kind)
    head.calibrate(-0.9)
    assert head(torch.randn(5, 8)).tolist() == pytest.approx([-0.9] * 5)


@pytest.mark.parametrize("kind", ["mlp", "scalar"])
@pytest.mark.parametrize("hidden_size", [8, 576, 4096])
def test_an_update_takes_the_share_of_the_mean_residual_at_any_width(kind, hidden_size):
    pool = prompt_states(64, hidden_size)
    head = calibrated(pool, rate=0.25)
    if kind == "scalar":
        head = head_of(hidden_size, kind)
        head.calibrate(-0.9)
        head.rate = 0.25
    before = update(head, pool, torch.full((64,), -1.9))
    after = head(pool).detach() + 1.9
    assert before.mean() == pytest.approx(1.0, abs=1e-6)
    assert after.mean() == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("hidden_size", [8, 576, 4096])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_no_prompt_moves_further_than_twice_the_share_of_the_residuals_that_there_are(hidden_size, size):
    """However small they are: Adam would make a full step of any noise. On prompts that it has not seen, too."""
    pool = prompt_states(96, hidden_size)
    head = calibrated(pool[:64], log_z=0.0, rate=0.5)
    residual = update(head, pool[:64], size * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    moved = head(pool).detach().abs()
    assert 0 < moved.max() <= 2 * 0.5 * residual.abs().mean() * (1 + 1e-5)


def test_residuals_that_cancel_do_not_move_the_mean():
    pool = prompt_states(2, 64).repeat_interleave(2, dim=0)  # two prompts, residuals -1 and 1 of each
    head = calibrated(pool)
    update(head, pool, torch.tensor([-1.9, 0.1, -1.9, 0.1]))
    assert head(pool).tolist() == pytest.approx([-0.9] * 4, abs=1e-6)


def test_the_unit_of_the_weights_does_not_matter():
    pool, wanted = prompt_states(16, 32), torch.linspace(-2, 0, 16)
    ratios = torch.linspace(0.8, 1.2, 16)
    one, other = calibrated(pool), calibrated(pool)
    update(one, pool, wanted, ratios)
    update(other, pool, wanted, 300.0 * ratios)  # the residual's weight is n in some presets
    torch.testing.assert_close(one(pool), other(pool))


def test_it_learns_to_tell_prompts_apart_though_their_states_are_nearly_parallel():
    pool, wanted = prompt_states(6, 64), torch.linspace(-2, 0, 6)
    head = calibrated(pool, log_z=-1.0)
    for _ in range(200):
        residual = update(head, pool, wanted)
    assert residual.square().mean() < 1e-3


def test_one_prompt_alone_is_stable_and_rounding_no_feature():
    pool = prompt_states(1, 64).expand(8, 64)
    head = calibrated(pool, log_z=0.0, rate=0.99)
    for _ in range(5):
        update(head, pool * (1 + 1e-7), torch.ones(8))
    assert head(pool).tolist() == pytest.approx([1.0] * 8, abs=1e-4)
    assert head.features(pool * (1 + 1e-6)).abs().max() < 1e-2  # of a share of 1


def test_the_hidden_layers_stay_as_drawn():
    pool = prompt_states(6, 16)
    head = calibrated(pool)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    update(head, pool, torch.zeros(6))
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"weight", "bias"}
    assert sum(parameter.numel() for parameter in head.learned()) == NUM_FEATURES + 1


def test_detached_unless_told_otherwise():
    for detach in (True, False):
        head = head_of(8, detach=detach)
        torch.nn.init.normal_(head.weight)
        pool = torch.randn(2, 8, requires_grad=True)
        head(pool).sum().backward()
        assert (pool.grad is None) == detach


def test_the_same_on_every_rank_whatever_was_drawn_before():
    torch.manual_seed(1)
    one = head_of(8, seed=5).state_dict()
    torch.manual_seed(2)
    other = head_of(8, seed=5).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_pool_is_the_mean_over_every_prompt_token_and_nothing_else():
    hidden = torch.arange(4.0)[:, None, None].expand(4, 2, 3).clone()  # position t holds the value t
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    hidden[3] = torch.nan_to_num(torch.tensor(1e30))
    assert pool_prompt(hidden, mask).tolist() == [[1.0] * 3, [0.0] * 3]


def test_half_precision_states_are_read_in_fp32():
    assert head_of(8)(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
