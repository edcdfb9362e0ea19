"""Rewards of text equal cases worked by hand and, on 20 shared cases, the published formulas written once more."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from megatron_powerflow.config import ObjectiveSection
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.training.rewards import (
    boxed_reward,
    cluster_reward,
    grade_rollouts,
    majority_reward,
)


def group(answers, gold=None, slot=0) -> list[Rollout]:
    prompt = Prompt("q", slot, (1,), answer=gold)
    return [Rollout(prompt, slot, i, (1,), (0.0,), "eos") for i in range(len(answers))]


def test_by_hand():
    answers = ["3", "4", "3", None, "6/2", None]
    assert cluster_reward(answers) == [3 / 6, 1 / 6, 3 / 6, 1 / 6, 3 / 6, 1 / 6]
    assert majority_reward(answers) == [1, 0, 1, 0, 1, 0]
    assert boxed_reward(answers) == [1, 1, 1, 0, 1, 0]
    assert grade_rollouts(group(answers, "4"), answers, "gold")[1] == [0, 1, 0, 0, 0, 0]
    assert grade_rollouts(group(answers, "4"), answers, "none")[1] == [0] * 6


def test_nobody_answers():
    assert cluster_reward([None] * 4) == [0.25] * 4
    assert majority_reward([None] * 4) == [0] * 4


def test_of_equally_common_answers_the_first_is_the_label():
    assert majority_reward(["5", "6", "6", "5", "7"]) == [1, 0, 0, 1, 0]


def test_groups_are_judged_apart():
    rollouts = group(["1", "1"], slot=0) + group(["1", "2"], slot=1)
    assert grade_rollouts(rollouts, ["1", "1", "1", "2"], "cluster")[1] == [1, 1, 0.5, 0.5]


def test_without_a_gold_answer_correctness_does_not_exist():
    assert math.isnan(grade_rollouts(group(["1"]), ["1"], "none")[0][0])
    assert grade_rollouts(group(["1", "2"], "1"), ["1", "2"], "none")[0] == [1, 0]


def shared_cases() -> list[list[str | None]]:
    generator = torch.Generator().manual_seed(5)
    cases = []
    for size in [4, 8, 16, 7, 5] * 4:
        drawn = torch.randint(0, 6, (size,), generator=generator).tolist()
        cases.append([None if value == 5 else str(value) for value in drawn])
    return cases


@pytest.mark.parametrize("answers", shared_cases())
def test_empo_and_ttrl_equal_their_formulas(answers):
    """EMPO: p(c_i) = |cluster| / G, with no answer a cluster of one. TTRL: 1[a_i = most common answer]."""
    counts = Counter(answer for answer in answers if answer is not None)
    empo = [counts[answer] / len(answers) if answer is not None else 1 / len(answers) for answer in answers]
    assert cluster_reward(answers) == pytest.approx(empo)
    label = counts.most_common(1)[0][0] if counts else object()
    assert majority_reward(answers) == [float(answer == label) for answer in answers]


def test_which_reward_an_objective_uses():
    assert ObjectiveSection(preset="grpo").text_reward == "gold"
    assert ObjectiveSection(preset="ttrl").text_reward == "majority"
    assert ObjectiveSection(preset="rl_traj").text_reward == "none"
    assert ObjectiveSection(preset="intuitor").text_reward == "none"
    assert ObjectiveSection(preset="la_tb", task_reward="majority").text_reward == "majority"
    assert ObjectiveSection(preset="la_tb").text_reward == "none"
