"""How good are the responses to a set of questions? avg@k, pass@k and maj@k, from counts of each question.

All are pure functions of whole numbers and flags, without torch. The evaluation uses them on files, training on its
rollouts.

Left out: which answers are right (`data/answers.py`), how different the texts are (`diversity.py`), files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QuestionCounts:
    """Holds the counts of one question's n responses, in the order they were drawn.

    Every tuple has n entries, n >= 1.

    Example (n = 4, gold 7, answers 7, none, 5, 7.0): correct (True, False, False, True), clusters (0, None, 1, 0).
    """

    task: str
    num_response_tokens: tuple[int, ...]
    truncated: tuple[bool, ...]  # cut at the length limit
    clusters: tuple[int | None, ...]  # equal answers share a number; None: no answer in a box
    correct: tuple[bool, ...] | None  # None: the question has no gold answer
    sequence_log_probs: tuple[float, ...]  # of what was sampled, at the sampling temperature, in nats

    @property
    def num_responses(self) -> int:
        """Returns n."""
        return len(self.clusters)


def summarize_tasks(questions: Sequence[QuestionCounts]) -> tuple[dict[str, dict], dict]:
    """Returns ({task: its `summarize`} in order of appearance, `summarize` of all questions together)."""
    tasks = dict.fromkeys(question.task for question in questions)
    return {task: summarize([q for q in questions if q.task == task]) for task in tasks}, summarize(questions)


def mean_over_tasks(tasks: Mapping[str, Mapping]) -> dict:
    """Returns the plain mean of the tasks' accuracies, each counting once whatever its number of questions.

    This is the paper's Avg. tasks: rows of `summarize`. The keys are num_tasks, of those with gold answers; avg; and
    avg_se = sqrt(sum se^2) / num_tasks, as the tasks' questions are drawn independently. avg is None where no task has
    gold answers, avg_se also where a task has no standard error.
    """
    graded = [row for row in tasks.values() if row["avg"] is not None]
    errors = [row["avg_se"] for row in graded]
    known = bool(errors) and None not in errors
    return {
        "num_tasks": len(graded),
        "avg": mean([row["avg"] for row in graded]),
        "avg_se": math.hypot(*errors) / len(errors) if known else None,
    }


def summarize(questions: Sequence[QuestionCounts]) -> dict:
    """Returns one row of an evaluation's table.

    num_questions; num_responses, over all questions. avg, avg_se, pass_at and pass_at_se {k: value} and maj are means
    over the questions that have a gold answer, None (and empty) where there are none; maj is of all n responses to a
    question. response_length_mean (tokens), truncated_fraction and boxed_rate are means over all responses.
    policy_entropy is in nats per response token, at the sampling temperature.
    """
    assert questions, "a summary needs at least one question"
    graded = [(question.clusters, question.correct) for question in questions if question.correct is not None]
    means = [sum(correct) / len(correct) for _, correct in graded]
    ks = _ks([len(correct) for _, correct in graded])
    pass_at = {k: [pass_at_k(len(correct), sum(correct), k) for _, correct in graded] for k in ks}
    num_responses = sum(question.num_responses for question in questions)
    num_tokens = sum(sum(question.num_response_tokens) for question in questions)
    return {
        "num_questions": len(questions),
        "num_responses": num_responses,
        "avg": mean(means),
        "avg_se": standard_error(means),
        "pass_at": {str(k): mean(values) for k, values in pass_at.items()},
        "pass_at_se": {str(k): standard_error(values) for k, values in pass_at.items()},
        "maj": mean([majority_correctness(clusters, correct) for clusters, correct in graded]),
        "response_length_mean": num_tokens / num_responses,
        "truncated_fraction": sum(sum(question.truncated) for question in questions) / num_responses,
        "boxed_rate": sum(c is not None for question in questions for c in question.clusters) / num_responses,
        "policy_entropy": -sum(sum(question.sequence_log_probs) for question in questions) / num_tokens,
    }


def pass_at_k(num_responses: int, num_correct: int, k: int) -> float:
    """Returns the chance that at least one of k responses, drawn without replacement from the n, is correct.

    1 - C(n-c, k) / C(n, k), unbiased (Chen et al., arXiv 2107.03374), as a product of factors in [0, 1]:
    the binomials themselves overflow.
    """
    assert 0 <= num_correct <= num_responses and 1 <= k <= num_responses
    if num_responses - num_correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_responses - num_correct + 1, num_responses + 1))


def majority_correctness(clusters: Sequence[int | None], correct: Sequence[bool], k: int | None = None) -> float:
    """Returns the expected correctness of the most common answer among the first k responses (None: among all).

    Responses without an answer do not vote. Tied clusters are chosen from uniformly, and so is a member of the
    chosen cluster: of 5 and 5 inches only the first is right where 5 cm is the gold answer. 0 when nobody votes.
    """
    members: dict[int, list[bool]] = {}
    for cluster, is_correct in list(zip(clusters, correct, strict=True))[:k]:
        if cluster is not None:
            members.setdefault(cluster, []).append(is_correct)
    largest = max(map(len, members.values()), default=0)
    winners = [sum(votes) / len(votes) for votes in members.values() if len(votes) == largest]
    return mean(winners) or 0.0


def mean(values: Sequence[float]) -> float | None:
    """Returns the mean of an exact sum; None without values."""
    return math.fsum(values) / len(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Returns the error of a mean over q questions, sqrt(sum (x - mean)^2 / (q - 1)) / sqrt(q); None for q < 2.

    It says how far another draw of questions would move the mean. The noise of sampling n responses is part of x.
    """
    if len(values) < 2:
        return None
    center = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - center) ** 2 for x in values) / (len(values) - 1) / len(values))


def _ks(num_responses: Sequence[int]) -> list[int]:
    """Returns 1, 2, 4, ... up to the number of responses that every question has."""
    fewest = min(num_responses, default=0)
    return [1 << power for power in range(fewest.bit_length()) if 1 << power <= fewest]
