"""How likely are the responses under the reference, and under the policy before an update? Forward passes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.reference import Reference
from megatron_powerflow.records import MicroBatch, ScoredBatch, extended
from megatron_powerflow.training.forward_step import Scorer, run_forward


def score(chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer) -> list[Tensor | None]:
    """Return the log-probs of each micro-batch's responses: [b, s] fp32 on the last stage, None elsewhere.

    Collective, as `run_forward` is.
    """
    log_probs = run_forward(chunks, batches, scorer, scorer.log_probs)
    return log_probs if log_probs else [None] * len(batches)


def score_certainty(
    chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer
) -> list[Tensor | None]:
    """Return the mean certainty of each response: [b] for each micro-batch on the last stage, None elsewhere.

    It is the mean over the response's tokens of logsumexp - mean of the logits: self-certainty (Intuitor, arXiv
    2505.19590), KL(Uniform || p), up to the constant log(vocabulary). Collective, as `run_forward` is.
    """

    def mean_certainty(hidden, chunk, batch) -> Tensor:
        return scorer.statistics(hidden, chunk, batch).certainty.sum(dim=1) / batch.num_response_tokens

    means = run_forward(chunks, batches, scorer, mean_certainty)
    return means if means else [None] * len(batches)


def score_reference(reference: Reference, batches: Sequence[MicroBatch], scorer: Scorer) -> list[MicroBatch]:
    """Return the micro-batches with the reference's log-probs: `ScoredBatch`es, on the last stage.

    They are as they were elsewhere, where nobody needs the numbers. Collective, as `run_forward` is.
    """
    with reference.weights() as chunks:
        scored = score(chunks, batches, scorer)
    return [
        batch if values is None else extended(batch, ScoredBatch, ref_log_probs=values)
        for batch, values in zip(batches, scored, strict=True)
    ]


def score_old(chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer) -> list[MicroBatch]:
    """Return the micro-batches with `old_log_probs`, on the last stage: by the policy as it is.

    Call it before the first update of the step. Collective, as `run_forward` is.
    """
    scored = score(chunks, batches, scorer)
    return [
        replace(batch, old_log_probs=values) if isinstance(batch, ScoredBatch) else batch
        for batch, values in zip(batches, scored, strict=True)
    ]


def with_saved_old(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Return the micro-batches of replayed rollouts with the saved log-probs of their sampler as `old_log_probs`.

    They stand in the place of what the trainer at the start of the step says (`SampledBy.SAVED`).
    """
    return [
        replace(batch, old_log_probs=batch.rollout_log_probs, old_from_sampler=True)
        if isinstance(batch, ScoredBatch)
        else batch
        for batch in batches
    ]


def scored_batches(batches: Sequence[MicroBatch]) -> list[ScoredBatch]:
    """Return the micro-batches as `ScoredBatch`es; each must have been scored, as all are on the last stage."""
    scored = [batch for batch in batches if isinstance(batch, ScoredBatch)]
    assert len(scored) == len(batches), "micro-batches without the reference's log-probs"
    return scored
