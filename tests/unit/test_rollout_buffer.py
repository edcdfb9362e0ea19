"""The table of a step that trains on several steps' rollouts: which rows are its own, and what of it is measured."""

from __future__ import annotations

import torch

from megatron_powerflow.metrics.reduce import ReductionSettings, reduce_rollouts, reduce_trained
from megatron_powerflow.records import ROLLOUT_COLUMNS
from megatron_powerflow.training.rollout_buffer import own_rows
from tests.unit.test_metric_names import table


def test_own_rows_are_those_of_age_0_numbered_as_in_their_step():
    """3 groups of 2 responses of each of 2 steps: slots 0, 2 and 4 are the step's own."""
    column = ROLLOUT_COLUMNS.index("rollout_index")
    rows = torch.zeros(12, len(ROLLOUT_COLUMNS), dtype=torch.float64)
    rows[:, column] = torch.arange(12).flip(0)
    rows[:, 1] = rows[:, column]
    own = own_rows(rows, 2, 2)
    assert own[:, column].tolist() == [5, 4, 3, 2, 1, 0]
    assert own[:, 1].tolist() == [9, 8, 5, 4, 1, 0]
    assert rows[:, column].tolist() == [*range(11, -1, -1)], "read only"
    assert own_rows(rows, 1, 2).equal(rows)


def test_numbers_of_the_objective_are_of_all_that_was_trained_on():
    settings = ReductionSettings(4, 20, alpha=2.0, has_tilt=True, energy_per_token=True)
    every, own = table(), table()[:4]
    values = reduce_rollouts(own, settings) | reduce_trained(every, settings)
    assert (values["num_rollouts"], values["num_rollouts_trained"], values["num_rollouts_kept"]) == (4, 8, 7)
    assert values["loss"] == (1 + 2 + 3 + 4 + 5 + 6 + 7) / 7
    assert values["response_length_mean"] == 5
    trained_alone = {"num_rollouts_trained", "lag_mean", "lag_max", "mixed_versions"}
    assert reduce_trained(own, settings).keys() - reduce_rollouts(own, settings).keys() == trained_alone
