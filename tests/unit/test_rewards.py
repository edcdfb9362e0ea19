"""Rewards of text equal cases worked by hand and, on 20 shared cases, the published formulas written once more."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from megatron_powerflow.config import ObjectiveSection
from megatron_powerflow.data.packing import AnnotatedRollout
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.training.rewards import (
    annotate,
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


class Words:
    """In the place of a tokenizer: 0 is a thought, another number n is \\boxed{n}."""

    def decode(self, token_ids) -> str:
        return " ".join(f"\\boxed{{{token}}}" if token else "hm" for token in token_ids)


def annotated(responses, tasks=(None,), **settings) -> list[AnnotatedRollout]:
    """One group per task, of the same responses; the gold answer is 7."""
    rollouts = [
        Rollout(Prompt("q", slot, (3, 3, 3, 3, 3, 3), answer="7", task=task), slot, i, tuple(tokens), (0.0,), "eos")
        for slot, task in enumerate(tasks)
        for i, tokens in enumerate(responses)
    ]
    return annotate(rollouts, ObjectiveSection(**settings), Words())


RESPONSES = [(0, 7), (0, 8), (0, 0), (0, 0, 0, 0, 0, 0)]


def test_psi_is_for_responses_without_an_answer_outside_exempt_tasks():
    found = annotated(RESPONSES, ("math", "creative"), psi=-0.5, psi_exempt_tasks=["creative"])
    assert [item.psi for item in found] == [0, 0, -0.5, -0.5, 0, 0, 0, 0]
    assert {item.psi for item in annotated(RESPONSES)} == {0.0}


def test_what_the_text_says_for_the_metrics():
    """boxed, correct, repeated 4-grams (two of three), distinct 2-grams 3/8, 3-grams 1/4 of all in the group."""
    found = [item.annotations for item in annotated(RESPONSES)]
    assert [values[:2] for values in found] == [(1, 1), (1, 0), (0, 0), (0, 0)]
    assert [values[2] for values in found] == pytest.approx([0, 0, 0, 2 / 3])
    assert {values[3:] for values in found} == {(3 / 8, 1 / 4)}


def test_the_energys_reward_is_scaled_and_only_flow_rls_is_an_advantage():
    """Gold: 1 0 0 0, mean 1/4, deviation with G - 1 1/2."""
    found = annotated(RESPONSES, task_reward="gold", reward_scale=3.0, reward_advantage=False)
    assert [item.reward for item in found] == [3, 0, 0, 0]
    found = annotated(RESPONSES, (None, None), task_reward="gold", reward_scale=3.0, reward_advantage=True)
    assert [item.reward for item in found] == pytest.approx([4.5, -1.5, -1.5, -1.5] * 2, rel=1e-5)


def test_the_reward_of_a_rival_is_neither_scaled_nor_centred():
    assert [item.reward for item in annotated(RESPONSES, preset="grpo")] == [1, 0, 0, 0]
    assert [item.reward for item in annotated(RESPONSES, preset="format_only")] == [1, 1, 0, 0]
    assert [item.reward for item in annotated(RESPONSES, preset="la_tb", task_reward="none")] == [0, 0, 0, 0]
