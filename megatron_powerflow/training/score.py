"""What do the reference, and the policy before an update, think of the responses? Forward passes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.reference import Reference
from megatron_powerflow.records import MicroBatch, ScoredBatch, extended
from megatron_powerflow.training.forward_step import Scorer, run_forward


def score(chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer) -> list[Tensor | None]:
    """[b, s] fp32 log-probs of each micro-batch's responses on the last stage; None elsewhere."""
    log_probs = run_forward(chunks, batches, scorer, scorer.log_probs)
    return log_probs if log_probs else [None] * len(batches)


def score_certainty(
    chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer
) -> list[Tensor | None]:
    """[b] mean over each response's tokens of logsumexp - mean of the logits, on the last stage; None elsewhere.

    Self-certainty (Intuitor, arXiv 2505.19590), KL(Uniform || p), up to the constant log(vocabulary).
    """

    def mean_certainty(hidden, chunk, batch) -> Tensor:
        return scorer.statistics(hidden, chunk, batch).certainty.sum(dim=1) / batch.num_response_tokens

    means = run_forward(chunks, batches, scorer, mean_certainty)
    return means if means else [None] * len(batches)


def score_reference(reference: Reference, batches: Sequence[MicroBatch], scorer: Scorer) -> list[MicroBatch]:
    """`ScoredBatch`es on the last stage; the micro-batches as they are elsewhere, where nobody needs the numbers."""
    with reference.weights() as chunks:
        scored = score(chunks, batches, scorer)
    return [
        batch if values is None else extended(batch, ScoredBatch, ref_log_probs=values)
        for batch, values in zip(batches, scored, strict=True)
    ]


def score_old(chunks: Sequence[PolicyModel], batches: Sequence[MicroBatch], scorer: Scorer) -> list[MicroBatch]:
    """The micro-batches with `old_log_probs` on the last stage: of the policy that sampled, before its first update."""
    scored = score(chunks, batches, scorer)
    return [
        replace(batch, old_log_probs=values) if isinstance(batch, ScoredBatch) else batch
        for batch, values in zip(batches, scored, strict=True)
    ]


def with_saved_old(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of replayed rollouts: the policy that sampled is gone, its sampler's log-probs are there."""
    return [
        replace(batch, old_log_probs=batch.rollout_log_probs, old_from_sampler=True)
        if isinstance(batch, ScoredBatch)
        else batch
        for batch in batches
    ]


def scored_batches(batches: Sequence[MicroBatch]) -> list[ScoredBatch]:
    """The same, of the last stage, where each has been scored."""
    scored = [batch for batch in batches if isinstance(batch, ScoredBatch)]
    assert len(scored) == len(batches), "micro-batches without the reference's log-probs"
    return scored
