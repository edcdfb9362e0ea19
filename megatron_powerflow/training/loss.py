"""What does a micro-batch contribute to the loss, and what do its rollouts look like? One function per form.

Every function gets hidden states of the last stage and gives (share of the step's loss, columns of the rollouts).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_powerflow.config import ObjectiveSection
from megatron_powerflow.metrics.loops import MIN_TURNS, find_loop
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.objective.policy_gradient import kl_terms, surrogate_terms
from megatron_powerflow.objective.presets import Balance, PolicyGradient
from megatron_powerflow.objective.trajectory_balance import balance_loss, token_spread
from megatron_powerflow.records import ANNOTATION_COLUMNS, ROLLOUT_COLUMNS, MicroBatch
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.group_baseline import with_log_z
from megatron_powerflow.training.residual import partial_of, residual_weight, weight_of

Columns = dict[str, Tensor]


def micro_batch_loss(
    hidden: Tensor,
    chunk: PolicyModel,
    batch: MicroBatch,
    scorer: Scorer,
    objective: ObjectiveSection,
    alpha: float | None,
    head: LogZHead | None,
    num_kept: int,
) -> tuple[Tensor, Tensor]:
    """(this micro-batch's share of the step's loss, its rows [b, len(ROLLOUT_COLUMNS)] fp64 detached)."""
    form = objective.form
    if isinstance(form, Balance):
        log_probs = scorer.log_probs(hidden, chunk, batch)
        if head is None and batch.whole_groups:
            (batch,) = with_log_z([batch], [log_probs.detach()], objective, form, alpha)
        log_z = batch.log_z if head is None else head(scorer.prompt_pool(hidden, batch))
        loss, columns = balance(log_probs, log_z, batch, objective, form, alpha, num_kept)
    elif isinstance(form, PolicyGradient):
        log_probs = scorer.log_probs(hidden, chunk, batch)
        loss, columns = policy_gradient(log_probs, batch, objective, form, num_kept)
    else:
        statistics = scorer.statistics(hidden, chunk, batch)
        log_probs = statistics.log_probs
        loss, columns = entropy_minimum(log_probs, statistics.entropy, batch, objective, num_kept)
    columns |= common_columns(log_probs.detach(), batch)
    missing = torch.full_like(batch.psi, torch.nan)
    return loss, torch.stack([columns.get(name, missing).detach().double() for name in ROLLOUT_COLUMNS], dim=1)


def balance(
    log_probs: Tensor,
    log_z: Tensor,
    batch: MicroBatch,
    objective: ObjectiveSection,
    form: Balance,
    alpha: float,
    num_kept: int,
) -> tuple[Tensor, Columns]:
    """w m (log Z' + ...)^2, summed over the micro-batch, over num_kept."""
    sequence = log_probs.sum(dim=1)
    weight, ratio = weight_of(sequence, batch, objective)
    effective = weight * residual_weight(batch, form)
    if batch.weight_factor is not None:
        effective = effective * batch.weight_factor
    partial = partial_of(sequence, batch, objective, form, alpha)
    spread = token_spread(log_probs, batch.ref_log_probs, batch.loss_mask, alpha) if form.per_token else 0.0
    loss, residual, terms = balance_loss(partial, log_z, effective, batch.kept, max(num_kept, 1), spread)
    columns = {"loss_term": terms, "log_z": log_z, "residual": residual, "weight": effective, "ratio": ratio}
    if objective.ratio != "none":
        columns["clipped"] = (weight != ratio).float()
    return loss, columns


def policy_gradient(
    log_probs: Tensor, batch: MicroBatch, objective: ObjectiveSection, form: PolicyGradient, num_kept: int
) -> tuple[Tensor, Columns]:
    """-A S / a or its clipped surrogate, and the KL term, summed over the micro-batch, over num_kept."""
    old = batch.old_log_probs if batch.old_log_probs is not None else log_probs.detach()
    terms, ratio, clipped = surrogate_terms(
        log_probs,
        old,
        batch.loss_mask,
        batch.advantage,
        batch.num_response_tokens,
        ratio=objective.ratio,
        score_norm=form.score_norm,
        clip_epsilon=objective.clip_epsilon or 0.0,
        upper_only=objective.clip == "upper",
    )
    terms = _kept_with_kl(terms, log_probs, batch, objective)
    columns = {"loss_term": terms, "advantage": batch.advantage, "ratio": ratio, "weight": torch.ones_like(ratio)}
    if objective.ratio != "none":
        columns["clipped"] = clipped
    return terms.sum() / max(num_kept, 1), columns


def entropy_minimum(
    log_probs: Tensor, entropy: Tensor, batch: MicroBatch, objective: ObjectiveSection, num_kept: int
) -> tuple[Tensor, Columns]:
    """Mean over a response's tokens of -sum_v p_v log p_v, by its own gradient (arXiv 2505.20282), over num_kept."""
    terms = _kept_with_kl(entropy.sum(dim=1) / batch.num_response_tokens, log_probs, batch, objective)
    ones = torch.ones_like(batch.psi)
    return terms.sum() / max(num_kept, 1), {"loss_term": terms, "ratio": ones, "weight": ones}


def _kept_with_kl(terms: Tensor, log_probs: Tensor, batch: MicroBatch, objective: ObjectiveSection) -> Tensor:
    if objective.kl_coefficient:
        kl = kl_terms(log_probs, batch.ref_log_probs, batch.num_response_tokens)
        terms = terms + objective.kl_coefficient * kl
    return torch.where(batch.kept, terms, 0.0)


def common_columns(log_probs: Tensor, batch: MicroBatch) -> Columns:
    """What is known of a rollout whatever the form. log_probs: [b, s] detached."""
    old = log_probs if batch.old_log_probs is None else batch.old_log_probs
    difference = torch.where(batch.loss_mask, old - batch.rollout_log_probs, 0.0)
    if batch.old_from_sampler:
        difference = torch.full_like(difference, torch.nan)
    loops = _loops(batch)
    return {
        "rollout_index": batch.rollout_index,
        "num_prompt_tokens": batch.prompt_mask.sum(dim=1),
        "num_response_tokens": batch.num_response_tokens,
        "sequence_log_prob": log_probs.sum(dim=1),
        "old_sequence_log_prob": old.sum(dim=1),
        "ref_sequence_log_prob": batch.ref_log_probs.sum(dim=1),
        "rollout_sequence_log_prob": batch.rollout_log_probs.sum(dim=1),
        "psi": batch.psi,
        "reward": batch.reward,
        "kept": batch.kept,
        "truncated": batch.truncated,
        "sampler_gap_sum": difference.abs().sum(dim=1),
        "sampler_gap_max": difference.abs().amax(dim=1),
        "token_ratio_sum": torch.where(batch.loss_mask, difference.exp(), torch.zeros_like(difference)).sum(dim=1),
        "max_log_prob": torch.where(batch.loss_mask, log_probs, -torch.inf).amax(dim=1),
        **dict(zip(("loop_tokens", "loop_nats", "entry_nats"), loops.unbind(dim=1), strict=True)),
        **dict(zip(ANNOTATION_COLUMNS, batch.annotations.unbind(dim=1), strict=True)),
    }


def _loops(batch: MicroBatch) -> Tensor:
    """[b, 3] tokens, nats a token and entry nats of each response's longest repetition; NaN without one. How long it
    must be to count as a loop depends on the run's limit, and is for the metrics to say."""
    found = np.full((len(batch.psi), 3), np.nan, dtype=np.float32)
    masks, targets, ref_log_probs = (
        tensor.cpu().numpy() for tensor in (batch.loss_mask, batch.targets, batch.ref_log_probs)
    )
    for row, mask in enumerate(masks):
        if loop := find_loop(targets[row][mask], ref_log_probs[row][mask], min_tokens=MIN_TURNS):
            found[row] = loop.num_tokens, loop.nats, loop.entry_nats
    return torch.from_numpy(found).to(batch.psi.device)
