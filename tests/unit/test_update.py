"""What an update makes of its micro-batches, by hand: its denominator, the head's start value, the mean weight.

The update itself is one of `tests/distributed`.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_powerflow.objective.objective import BalanceObjective, ImportanceRule
from megatron_powerflow.objective.presets import PRESETS
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import ROLLOUT_COLUMNS
from megatron_powerflow.training import update
from megatron_powerflow.training.update import calibrate_head
from tests.batches import scored_batch
from tests.unit.test_loss import REF


@pytest.fixture(scope="module")
def groups():
    """Of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    names = ("tp", "pp", "cp", "dp", "ep", "edp", "tp_dp", "control", "pp_control", "ep_control")
    yield Groups(0, 1, torch.device("cpu"), **dict.fromkeys(names, dist.group.WORLD))
    dist.destroy_process_group()


def two_updates(**fields):
    """Of one micro-batch each: the three responses of `test_loss.py`, and one with S_ref = -4."""
    return [[scored_batch(REF, **{"psi": [0.0, -0.5, 0.0]} | fields)], [scored_batch([(-4,)])]]


class Head:
    started_at = None

    def calibrate(self, log_z: float) -> None:
        self.started_at = log_z


@pytest.mark.parametrize(
    ("preset", "fields", "expected"),
    [
        ("la_tb", {}, -(1 + 3.5 + 2 + 4) / 4),
        ("la_tb", {"reward": [1.0, 0.0, 0.0]}, -(0 + 3.5 + 2 + 4) / 4),
        ("la_tb", {"kept": [True, False, True]}, -(1 + 2 + 4) / 3),
        ("tb_traj", {}, -(3 + 6 + 2 + 4) / 4),
        ("tb_token_score", {}, -(3 * 1 + 2 * 3.5 + 2 + 4) / 7),
        ("tb_token_score", {"kept": [True, False, True]}, -(3 * 1 + 2 + 4) / 5),
    ],
)
def test_a_head_starts_where_the_mean_residual_is_0(groups, preset, fields, expected):
    """At S = S_ref and alpha 2 the residual without log Z' is -S_ref/a - 2 psi - r: 1, 2.5 + 1, 2 | 4 of la_tb."""
    head, which = Head(), BalanceObjective(PRESETS[preset], 2.0, "scalar", ImportanceRule("none"))
    found = calibrate_head(SimpleNamespace(head=head), two_updates(**fields), which, SimpleNamespace(groups=groups))
    assert found == head.started_at == pytest.approx(expected)


def test_a_head_starts_at_0_where_nothing_was_kept(groups):
    updates = [[scored_batch(REF, kept=[False] * 3)]]
    which = BalanceObjective(PRESETS["la_tb"], 2.0, "scalar", ImportanceRule("none"))
    assert calibrate_head(SimpleNamespace(head=None), updates, which, SimpleNamespace(groups=groups)) == 0.0


def test_the_denominator_of_the_loss_is_what_is_kept_on_all_ranks(groups, monkeypatch):
    batches = [scored_batch(REF, kept=[True, False, True]), scored_batch([(-4,)])]
    assert update._num_kept(batches, groups) == 3

    def another_rank_with_as_many(count, group):
        assert group is groups.dp
        count *= 2

    monkeypatch.setattr(dist, "all_reduce", another_rank_with_as_many)
    assert update._num_kept(batches, groups) == 6


def test_the_mean_weight_is_over_kept_rollouts():
    table = torch.zeros(4, len(ROLLOUT_COLUMNS), dtype=torch.float64)
    table[:, ROLLOUT_COLUMNS.index("weight")] = torch.tensor([1.0, 3.0, 50.0, 2.0]).double()
    table[:, ROLLOUT_COLUMNS.index("kept")] = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()
    assert update._mean_weight(table) == 2.0
    table[:, ROLLOUT_COLUMNS.index("kept")] = 0.0
    assert update._mean_weight(table) == 0.0
