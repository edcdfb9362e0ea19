"""What does a micro-batch contribute to the loss, and what do its rollouts look like? One function per form.

Every function gets hidden states of the last stage and gives (share of the step's loss, columns of the rollouts).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_powerflow.metrics.loops import MIN_TURNS, find_loop
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.objective.objective import (
    BalanceObjective,
    EntropyObjective,
    Objective,
    PolicyGradientObjective,
    SamplerRule,
)
from megatron_powerflow.objective.policy_gradient import kl_terms, surrogate_terms
from megatron_powerflow.objective.sampler_weight import SamplerWeight, sampler_token_weight, sampler_weight
from megatron_powerflow.objective.trajectory_balance import balance_loss, token_spread
from megatron_powerflow.records import (
    ANNOTATION_COLUMNS,
    LAG_COLUMNS,
    ROLLOUT_COLUMNS,
    EstimatedBatch,
    RewardedBatch,
    ScoredBatch,
)
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.group_baseline import with_log_z
from megatron_powerflow.training.residual import (
    importance_of,
    residual_weight,
    residual_without_log_z,
    sampler_weight_of,
)

Columns = dict[str, Tensor]
LOOP_COLUMNS = ("loop_tokens", "loop_nats", "entry_nats")


def micro_batch_loss(
    hidden: Tensor,
    chunk: PolicyModel,
    batch: ScoredBatch,
    scorer: Scorer,
    objective: Objective,
    head: LogZHead | None,
    num_kept: int,
) -> tuple[Tensor, Tensor]:
    """Return this micro-batch's share of the loss, and a row of numbers for each of its rollouts.

    The rows are [b, len(ROLLOUT_COLUMNS)] fp64, detached; `with_loops` fills in the rest. hidden: [t / cp, r, H], whole
    over tp. head: the learned log Z', or None. num_kept: rollouts of the update that take part, over all ranks.
    Collective over tp, and over cp where the batch has a stream.
    """
    if isinstance(objective, BalanceObjective):
        log_probs = scorer.log_probs(hidden, chunk, batch)
        if head is not None:
            log_z, factor = head(scorer.prompt_pool(hidden, batch)), torch.ones_like(batch.psi)
        else:
            estimated = batch if isinstance(batch, EstimatedBatch) else _estimated(batch, log_probs.detach(), objective)
            log_z, factor = estimated.log_z, estimated.weight_factor
        loss, columns = balance(log_probs, log_z, factor, batch, objective, num_kept)
    elif isinstance(objective, PolicyGradientObjective):
        assert isinstance(batch, RewardedBatch)
        log_probs = scorer.log_probs(hidden, chunk, batch)
        loss, columns = policy_gradient(log_probs, batch, objective, num_kept)
    else:
        statistics = scorer.statistics(hidden, chunk, batch)
        log_probs = statistics.log_probs
        loss, columns = entropy_minimum(log_probs, statistics.entropy, batch, objective, num_kept)
    columns |= common_columns(log_probs.detach(), batch)
    missing = torch.full_like(batch.psi, torch.nan)
    return loss, torch.stack([columns.get(name, missing).detach().double() for name in ROLLOUT_COLUMNS], dim=1)


def _estimated(batch: ScoredBatch, log_probs: Tensor, objective: BalanceObjective) -> EstimatedBatch:
    """Return the batch with log Z' from this very forward pass: its groups are whole in the micro-batch."""
    assert batch.whole_groups
    return with_log_z([batch], [log_probs], objective)[0]


def balance(
    log_probs: Tensor,
    log_z: Tensor,
    factor: Tensor,
    batch: ScoredBatch,
    objective: BalanceObjective,
    num_kept: int,
) -> tuple[Tensor, Columns]:
    """Return the trajectory-balance loss of a micro-batch, and columns of its rollouts.

    The loss is w v m (log Z' + ...)^2, summed over the micro-batch, over num_kept (Eq. 10, arXiv 2603.18363, with v for
    the sampler's sake). log_probs: [b, s] with gradient; log_z: [b], with gradient where a head says it; factor: [b],
    on the weight w v m.
    """
    sequence = log_probs.sum(dim=1)
    importance, ratio = importance_of(sequence, batch, objective)
    v = sampler_weight_of(sequence, batch, objective)
    weight = importance * v.weight * residual_weight(batch, objective) * factor
    partial = residual_without_log_z(sequence, batch, objective)
    spread: Tensor | float = 0.0
    if objective.form.per_token:
        spread = token_spread(log_probs, batch.ref_log_probs, batch.loss_mask, objective.alpha)
    loss, residual, terms = balance_loss(partial, log_z, weight, batch.kept, max(num_kept, 1), spread)
    columns = {"loss_term": terms, "log_z": log_z, "residual": residual, "weight": weight, "ratio": ratio}
    if objective.importance.ratio != "none":
        columns["clipped"] = (importance != ratio).float()
    return loss, columns | _weights(v, importance * v.weight, objective)


def policy_gradient(
    log_probs: Tensor, batch: RewardedBatch, objective: PolicyGradientObjective, num_kept: int
) -> tuple[Tensor, Columns]:
    """Return the policy-gradient loss of a micro-batch, and columns of its rollouts.

    The loss is -A S / a or its clipped surrogate (`surrogate_terms`), and the KL term (`kl_terms`), summed over the
    micro-batch, over num_kept. Neither w nor v weighs the KL term. log_probs: [b, s] with gradient.
    """
    old, rule = batch.old_log_probs if batch.old_log_probs is not None else log_probs.detach(), objective.importance
    v, token_weight = _sampler_weights(old, batch, objective.sampler)
    terms, ratio, clipped, importance = surrogate_terms(
        log_probs,
        old,
        batch.loss_mask,
        batch.advantage,
        batch.num_response_tokens,
        ratio=rule.ratio,
        score_norm=objective.form.score_norm,
        clip_epsilon=rule.epsilon,
        upper_only=rule.upper_only,
        sampler_weight=v.weight if token_weight is None else token_weight,
    )
    terms = _kept_with_kl(terms, log_probs, batch, objective.kl_coefficient)
    columns = {"loss_term": terms, "advantage": batch.advantage, "ratio": ratio, "weight": v.weight}
    if rule.ratio != "none":
        columns["clipped"] = clipped
    return terms.sum() / max(num_kept, 1), columns | _weights(v, importance, objective)


def _sampler_weights(old: Tensor, batch: ScoredBatch, rule: SamplerRule) -> tuple[SamplerWeight, Tensor | None]:
    """Return v of each response, of tokens their mean, [b]; and v of each token, [b, s], where it is theirs.

    old: [b, s], by the trainer at the start of the step.
    """
    num_tokens, sampler = batch.num_response_tokens, batch.rollout_log_probs
    if rule.ratio != "token":
        v = sampler_weight(old.sum(dim=1), sampler.sum(dim=1), num_tokens, ratio=rule.ratio, cap=rule.cap)
        return v, None
    token_weight, share = sampler_token_weight(old, sampler, batch.loss_mask, num_tokens, cap=rule.cap)
    mean = torch.where(batch.loss_mask, token_weight, 0.0).sum(dim=1) / num_tokens
    return SamplerWeight(mean, share), token_weight


def _weights(v: SamplerWeight, importance: Tensor, objective: BalanceObjective | PolicyGradientObjective) -> Columns:
    """Return the columns of v, and of the whole importance weight w v, [b]: each where the config has it."""
    columns = {}
    if objective.sampler.ratio != "none":
        columns = {"sampler_weight": v.weight, "sampler_truncated": v.truncated}
    if objective.sampler.ratio != "none" or objective.importance.ratio != "none":
        columns["importance"] = importance
    return columns


def entropy_minimum(
    log_probs: Tensor, entropy: Tensor, batch: ScoredBatch, objective: EntropyObjective, num_kept: int
) -> tuple[Tensor, Columns]:
    """Return the entropy loss of a micro-batch, and columns of its rollouts.

    The loss is the mean over a response's tokens of -sum_v p_v log p_v, by its own gradient (arXiv 2505.20282), and the
    KL term (`kl_terms`), summed over the micro-batch, over num_kept. log_probs, entropy: [b, s] with gradient.
    """
    mean_entropy = entropy.sum(dim=1) / batch.num_response_tokens
    terms = _kept_with_kl(mean_entropy, log_probs, batch, objective.kl_coefficient)
    ones = torch.ones_like(batch.psi)
    return terms.sum() / max(num_kept, 1), {"loss_term": terms, "ratio": ones, "weight": ones}


def _kept_with_kl(terms: Tensor, log_probs: Tensor, batch: ScoredBatch, kl_coefficient: float) -> Tensor:
    if kl_coefficient:
        terms = terms + kl_coefficient * kl_terms(log_probs, batch.ref_log_probs, batch.num_response_tokens)
    return torch.where(batch.kept, terms, 0.0)


def common_columns(log_probs: Tensor, batch: ScoredBatch) -> Columns:
    """Return the columns of the rollouts that do not depend on the form of the objective, but for LOOP_COLUMNS.

    log_probs: [b, s] detached.
    """
    old = log_probs if batch.old_log_probs is None else batch.old_log_probs
    lag = dict(zip(LAG_COLUMNS, batch.lag.unbind(dim=1), strict=True))
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
        **lag,
        **_apart(old, batch, lag["lag_max"] == 0),
        "max_log_prob": torch.where(batch.loss_mask, log_probs, -torch.inf).amax(dim=1),
        **dict(zip(ANNOTATION_COLUMNS, batch.annotations.unbind(dim=1), strict=True)),
    }


def _apart(old: Tensor, batch: ScoredBatch, same_weights: Tensor) -> Columns:
    """Return how far the trainer at the start of the step is from the sampler, as a gap or as staleness.

    Where both have the same weights it is the gap of their kernels; else the step between the weights is in it as well,
    and it stands in other columns. old: [b, s], by the trainer at the start. same_weights: [b] bool.
    """
    difference = torch.where(batch.loss_mask, old - batch.rollout_log_probs, 0.0)
    if batch.old_from_sampler:
        difference = torch.full_like(difference, torch.nan)
    numbers = {
        "sum": difference.abs().sum(dim=1),
        "max": difference.abs().amax(dim=1),
        "kl_sum": (difference.exp() - difference - 1.0).sum(dim=1),  # k3: KL(sampler || trainer)
    }
    ratios = torch.where(batch.loss_mask, difference.exp(), torch.zeros_like(difference)).sum(dim=1)
    gap = {f"sampler_gap_{name}": torch.where(same_weights, value, torch.nan) for name, value in numbers.items()}
    staleness = {f"staleness_{name}": torch.where(same_weights, torch.nan, value) for name, value in numbers.items()}
    return gap | staleness | {"token_ratio_sum": torch.where(same_weights, ratios, torch.nan)}


def with_loops(rows: Tensor, batches: Sequence[ScoredBatch]) -> Tensor:
    """Return the rows of an update's micro-batches with LOOP_COLUMNS, which `micro_batch_loss` leaves NaN.

    rows: [sum of b, len(ROLLOUT_COLUMNS)] fp64 on the host, in the order of the micro-batches. To find them the host
    reads the micro-batches back from the GPU, and waits for all that was launched before: so call it after the passes.
    """
    with_them, places = rows.clone(), [ROLLOUT_COLUMNS.index(name) for name in LOOP_COLUMNS]
    with_them[:, places] = torch.cat([_loops(batch) for batch in batches]).double()
    return with_them


def _loops(batch: ScoredBatch) -> Tensor:
    """Return LOOP_COLUMNS of each response's longest repetition: [b, 3] fp32 on the host; NaN without one.

    How long it must be to count as a loop depends on the run's limit, and is for the metrics to say.
    """
    loops = np.full((len(batch.psi), 3), np.nan, dtype=np.float32)
    masks, targets, ref_log_probs = (
        tensor.cpu().numpy() for tensor in (batch.loss_mask, batch.targets, batch.ref_log_probs)
    )
    for row, mask in enumerate(masks):
        if loop := find_loop(targets[row][mask], ref_log_probs[row][mask], min_tokens=MIN_TURNS):
            loops[row] = loop.num_tokens, loop.nats, loop.entry_nats
    return torch.from_numpy(loops)
