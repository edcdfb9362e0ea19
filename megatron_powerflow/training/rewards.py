"""What does the text of each rollout say? Format penalty, reward, correctness, and numbers for the metrics.

Left out: rewards made of log-probs (`group_baseline.py`), equality of answers (`data/answers.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import torch

from megatron_powerflow.config import ObjectiveSection
from megatron_powerflow.data.answers import clusters, extract_answer, verdicts
from megatron_powerflow.data.packing import AnnotatedRollout
from megatron_powerflow.data.tokenizer import Tokenizer
from megatron_powerflow.metrics.repetition import distinct_share, repeated_share
from megatron_powerflow.objective.policy_gradient import group_advantage
from megatron_powerflow.records import Rollout


def annotate(rollouts: Sequence[Rollout], objective: ObjectiveSection, tokenizer: Tokenizer) -> list[AnnotatedRollout]:
    """Return the rollouts with penalty, reward and numbers for the metrics, which follow from their text.

    rollouts: of whole groups, sorted by slot. The result is a function of them alone, so equal on every rank that holds
    them.
    """
    answers = [extract_answer(tokenizer.decode(rollout.response_token_ids)) for rollout in rollouts]
    correct, rewards = grade_rollouts(rollouts, answers, objective.text_reward)
    if objective.task_reward not in (None, "none"):
        rewards = _energy_rewards(rewards, rollouts, objective)
    distinct = {slot: (distinct_share(group, 2), distinct_share(group, 3)) for slot, group in _token_groups(rollouts)}
    return [
        AnnotatedRollout(
            rollout,
            psi=format_penalty(
                rollout, answer is not None, psi=objective.psi or 0.0, exempt_tasks=objective.psi_exempt_tasks or ()
            ),
            reward=reward,
            annotations=(
                float(answer is not None),
                right,
                repeated_share(rollout.response_token_ids),
                *distinct[rollout.slot],
            ),
        )
        for rollout, answer, right, reward in zip(rollouts, answers, correct, rewards, strict=True)
    ]


def grade_rollouts(
    rollouts: Sequence[Rollout], answers: Sequence[str | None], reward: str
) -> tuple[list[float], list[float]]:
    """Return the correctness and the named reward of each rollout of whole groups.

    Correctness is 1 or 0, or NaN where the prompt has no answer. rollouts: sorted by slot. answers: what each response
    answers, None without an answer. reward: "gold", which is the correctness, or a key of OF_ANSWERS.
    """
    correct: list[float] = []
    rewards: list[float] = []
    for _, members in groupby(zip(rollouts, answers, strict=True), key=lambda pair: pair[0].slot):
        group, group_answers = zip(*members, strict=True)
        said = verdicts(group_answers, group[0].prompt.answer)
        right = [math.nan if verdict is None else float(verdict) for verdict in said]
        correct += right
        rewards += right if reward == "gold" else OF_ANSWERS[reward](group_answers)
    return correct, rewards


def cluster_reward(answers: Sequence[str | None]) -> list[float]:
    """Return r_i = (size of i's cluster) / G for the answers of a group (EMPO, arXiv 2504.05812).

    A response without an answer is alone in its cluster.
    """
    numbers = clusters(answers)
    sizes = Counter(numbers)
    return [(1 if number is None else sizes[number]) / len(answers) for number in numbers]


def majority_reward(answers: Sequence[str | None]) -> list[float]:
    """Return 1 for each answer that is the most common one of its group, else 0 (TTRL, arXiv 2504.16084).

    Of equally common answers the earliest counts.
    """
    numbers = clusters(answers)
    votes = Counter(number for number in numbers if number is not None)
    label = votes.most_common(1)[0][0] if votes else math.nan
    return [float(number == label) for number in numbers]


def boxed_reward(answers: Sequence[str | None]) -> list[float]:
    """Return 1 for each response that has an answer in a box at all, else 0."""
    return [float(answer is not None) for answer in answers]


OF_ANSWERS = {
    "cluster": cluster_reward,
    "majority": majority_reward,
    "boxed": boxed_reward,
    "none": lambda answers: [0.0] * len(answers),
}


def _energy_rewards(rewards: Sequence[float], rollouts: Sequence[Rollout], objective: ObjectiveSection) -> list[float]:
    """Return beta r, or beta times the advantage of r in its group (FlowRL, arXiv 2509.15207)."""
    assert objective.reward_scale is not None, "config_rules.py fills it in where there is a task_reward"
    values = torch.tensor(rewards, dtype=torch.float64)
    if objective.reward_advantage:
        slots = torch.tensor([rollout.slot for rollout in rollouts])
        values = group_advantage(values, slots, torch.ones_like(slots, dtype=torch.bool), divide_by_std=True)
    return (objective.reward_scale * values).tolist()


def _token_groups(rollouts: Sequence[Rollout]):
    for slot, members in groupby(rollouts, key=lambda rollout: rollout.slot):
        yield slot, [rollout.response_token_ids for rollout in members]


def format_penalty(rollout: Rollout, boxed: bool, *, psi: float, exempt_tasks: Sequence[str]) -> float:
    """Return psi for a response without a box, 0 for one with a box; tasks that ask for no box are exempt.

    psi enters the energy per token: a response without \\boxed{} has alpha * psi added to each of its n tokens' share,
    so psi = -0.5 at alpha = 4 is -2 nats a token.
    """
    return 0.0 if boxed or rollout.prompt.task in exempt_tasks else psi
