"""What has become of the policy, on prompts it is not trained on? A line of evaluations.jsonl.

Every line is of the same prompts and the same random numbers, so that two of them differ by the policy alone:
`metrics/change.py` compares them prompt by prompt.

Left out: benchmarks and files (`evaluation/`), which `powerflow evaluate` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from megatron_powerflow.data.answers import extract_answer, grade
from megatron_powerflow.metrics.counts import QuestionCounts, summarize
from megatron_powerflow.metrics.realised_alpha import realised_alpha
from megatron_powerflow.metrics.repetition import distinct_share, repeated_share
from megatron_powerflow.objective.presets import Balance
from megatron_powerflow.parallel.collectives import every_rollout
from megatron_powerflow.records import Purpose, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import ProgressCallback
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.rewards import annotate
from megatron_powerflow.training.score_rollouts import reference_sequence_log_probs
from megatron_powerflow.training.session import Session

SUMMARY = ("pass_at", "maj", "response_length_mean", "truncated_fraction", "boxed_rate", "policy_entropy")


def evaluate_held_out(
    plan: Plan, session: Session, sampling: SamplingParams, step: int, progress: ProgressCallback | None = None
) -> dict[str, Any] | None:
    """On the main rank a line with step, accuracy, accuracy_se, pass_at, maj, response_length_mean,
    truncated_fraction, boxed_rate, distinct_2, distinct_3, repeated_share, policy_entropy and ref_log_prob_mean (nats a
    token), alpha_realised and its interval, and `by_prompt`: id and numbers, each a list over prompts; None elsewhere.
    Collective."""
    groups = session.groups
    sampling = replace(sampling, purpose=Purpose.HELD_OUT)
    mine = list(enumerate(plan.evaluation_prompts))[groups.sampler_rank :: groups.num_samplers]
    rollouts = every_rollout(session.engine.generate(mine, sampling, progress), groups)
    session.engine.rest()  # the base is scored on the same devices
    reference = reference_sequence_log_probs(rollouts, plan, session)
    return evaluation_line(rollouts, reference, plan, step) if groups.is_main else None


def evaluation_line(rollouts: Sequence[Rollout], reference: np.ndarray, plan: Plan, step: int) -> dict[str, Any]:
    """rollouts: of whole prompts, by slot; reference: [B] the base model's log-probs of the responses, nats."""
    by_prompt = [list(members) for _, members in groupby(rollouts, key=lambda rollout: rollout.slot)]
    counts = [_counts(members, plan) for members in by_prompt]
    summary = summarize(counts)
    tokens = [[rollout.response_token_ids for rollout in members] for members in by_prompt]
    lengths = np.array([len(response) for group in tokens for response in group])
    distinct_2 = [distinct_share(group, 2) for group in tokens]
    per_prompt = {
        "id": [members[0].prompt.id for members in by_prompt],
        "ref_log_prob_mean": _per_token(reference, lengths, by_prompt),
        "policy_entropy": _per_token(-_sampled(rollouts), lengths, by_prompt),
        "distinct_2": distinct_2,
        "response_length_mean": [float(np.mean([len(response) for response in group])) for group in tokens],
    }
    return {
        "step": step,
        "accuracy": summary["avg"],
        "accuracy_se": summary["avg_se"],
        **{name: summary[name] for name in SUMMARY},
        "ref_log_prob_mean": float(reference.sum() / lengths.sum()),
        "num_prompts": len(by_prompt),
        "num_responses": plan.config.evaluation.num_responses,
        "distinct_2": float(np.mean(distinct_2)),
        "distinct_3": float(np.mean([distinct_share(group, 3) for group in tokens])),
        "repeated_share": float(np.mean([repeated_share(response) for group in tokens for response in group])),
        **_realised(rollouts, reference, lengths, plan),
        "by_prompt": per_prompt,
    }


def _sampled(rollouts: Sequence[Rollout]) -> np.ndarray:
    """[B] nats: what the sampler says of each response."""
    return np.array([sum(rollout.rollout_log_probs) for rollout in rollouts])


def _per_token(sums: np.ndarray, lengths: np.ndarray, by_prompt: Sequence[Sequence[Rollout]]) -> list[float]:
    """Of each prompt's responses together."""
    ends = np.cumsum([len(members) for members in by_prompt])[:-1]
    parts = zip(np.split(sums, ends), np.split(lengths, ends), strict=True)
    return [float(values.sum() / tokens.sum()) for values, tokens in parts]


def _realised(rollouts: Sequence[Rollout], reference: np.ndarray, lengths: np.ndarray, plan: Plan) -> dict[str, float]:
    """Which power of the base model the responses show: see `metrics/realised_alpha.py`."""
    objective, added = plan.config.objective, np.zeros(len(rollouts))
    counted = lengths if objective.tilt_cap is None else np.minimum(lengths, objective.tilt_cap)
    if objective.alpha is not None and isinstance(objective.form, Balance):
        annotated = annotate(rollouts, objective, plan.tokenizer)
        added = np.array([objective.alpha * item.psi + item.reward for item in annotated])
        added = added * counted if objective.form.per_length else added
    prompts = np.array([rollout.slot for rollout in rollouts])
    metrics = realised_alpha(_sampled(rollouts), reference, counted, prompts, added)
    return {name: float(value) for name, value in metrics.items()}


def _counts(members: Sequence[Rollout], plan: Plan) -> QuestionCounts:
    """One prompt's responses, counted."""
    answers = [extract_answer(plan.tokenizer.decode(rollout.response_token_ids)) for rollout in members]
    grades = grade(answers, members[0].prompt.answer)
    has_answer = members[0].prompt.answer is not None
    return QuestionCounts(
        task=members[0].prompt.task or "",
        num_response_tokens=tuple(len(rollout.response_token_ids) for rollout in members),
        truncated=tuple(rollout.finish_reason == "length" for rollout in members),
        clusters=tuple(one.cluster for one in grades),
        correct=tuple(bool(one.correct) for one in grades) if has_answer else None,
        sequence_log_probs=tuple(sum(rollout.rollout_log_probs) for rollout in members),
    )
