"""How well does the policy answer prompts it is not trained on? A line of evaluations.jsonl.

Left out: benchmarks and files (`evaluation/`), which `powerflow evaluate` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from megatron_powerflow.data.answers import extract_answer
from megatron_powerflow.data.grading import grade
from megatron_powerflow.metrics.counts import QuestionCounts, summarize
from megatron_powerflow.metrics.repetition import distinct_n, repeated_share
from megatron_powerflow.parallel.collectives import gather_to_main
from megatron_powerflow.records import Purpose, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import Progress
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.setup import Session


def evaluate_held_out(
    plan: Plan, session: Session, sampling: SamplingParams, step: int, progress: Progress | None = None
) -> dict[str, Any] | None:
    """On the main rank a line with step, accuracy, accuracy_se, pass_at, maj, response_length_mean,
    truncated_fraction, boxed_rate, distinct_2, distinct_3, repeated_share, policy_entropy (nats a token);
    None elsewhere. Collective."""
    groups, section = session.groups, plan.config.evaluation
    sampling = replace(sampling, purpose=Purpose.HELD_OUT)
    mine = list(enumerate(plan.evaluation_prompts))[groups.sampler_rank :: groups.num_samplers]
    rollouts = session.engine.generate(mine, sampling, progress)
    reports = groups.is_first_stage and groups.tp_rank == 0
    gathered = gather_to_main(rollouts if reports else [], groups)
    if gathered is None:
        return None
    every = sorted((r for part in gathered for r in part), key=lambda r: (r.slot, r.response_index))
    by_prompt = [list(members) for _, members in groupby(every, key=lambda rollout: rollout.slot)]
    summary = summarize([_counts(members, plan) for members in by_prompt])
    tokens = [[rollout.response_token_ids for rollout in members] for members in by_prompt]
    return {
        "step": step,
        "accuracy": summary["avg"],
        "accuracy_se": summary["avg_se"],
        **{
            name: summary[name]
            for name in (
                "pass_at",
                "maj",
                "response_length_mean",
                "truncated_fraction",
                "boxed_rate",
                "policy_entropy",
            )
        },
        "num_prompts": len(by_prompt),
        "num_responses": section.num_responses,
        "distinct_2": float(np.mean([distinct_n(group, 2) for group in tokens])),
        "distinct_3": float(np.mean([distinct_n(group, 3) for group in tokens])),
        "repeated_share": float(np.mean([repeated_share(response) for group in tokens for response in group])),
    }


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
