"""The log Z' head: starts at the calibrated constant, reads the prompt alone, never reaches the policy unasked."""

from __future__ import annotations

import pytest
import torch

from megatron_powerflow.model.log_z_head import LogZHead, pool_prompt


@pytest.mark.parametrize("kind", ["mlp", "scalar"])
def test_it_starts_at_the_calibrated_value_for_every_prompt(kind):
    head = LogZHead(8, kind=kind, detach=True, seed=0)
    head.calibrate(-0.9)
    assert head(torch.randn(5, 8)).tolist() == pytest.approx([-0.9] * 5)


def test_it_learns_to_tell_prompts_apart():
    head = LogZHead(8, kind="mlp", detach=True, seed=0)
    head.calibrate(-1.0)
    pool, wanted = torch.randn(6, 8), torch.linspace(-2, 0, 6)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        loss = (head(pool) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_detached_unless_told_otherwise():
    for detach in (True, False):
        head = LogZHead(8, kind="mlp", detach=detach, seed=0)
        torch.nn.init.normal_(head.last.weight)
        pool = torch.randn(2, 8, requires_grad=True)
        head(pool).sum().backward()
        assert (pool.grad is None) == detach


def test_the_same_on_every_rank_whatever_was_drawn_before():
    torch.manual_seed(1)
    one = LogZHead(8, kind="mlp", detach=True, seed=5).state_dict()
    torch.manual_seed(2)
    other = LogZHead(8, kind="mlp", detach=True, seed=5).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_pool_is_the_mean_over_every_prompt_token_and_nothing_else():
    hidden = torch.arange(4.0)[:, None, None].expand(4, 2, 3).clone()  # position t holds the value t
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    hidden[3] = torch.nan_to_num(torch.tensor(1e30))
    assert pool_prompt(hidden, mask).tolist() == [[1.0] * 3, [0.0] * 3]


def test_half_precision_states_are_read_in_fp32():
    head = LogZHead(8, kind="mlp", detach=True, seed=0)
    assert head(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
