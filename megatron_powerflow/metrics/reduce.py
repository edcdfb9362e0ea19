"""Which metrics do the rollouts of a step give? Every metric comes from one table and states its denominator.

The table has a row for each rollout of the whole step (all ranks, sorted). So a metric is the same number under every
layout, a quantile is one of all rollouts, and there are no means of means over ranks.

Left out: collecting the rows (`training/update.py`), times (`throughput.py`), writing (`writers.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_powerflow.metrics.prompt_statistics import length_statistics
from megatron_powerflow.metrics.realised_alpha import realised_alpha
from megatron_powerflow.metrics.tilt import energy_per_token
from megatron_powerflow.metrics.trap import has_loop, trap_metrics
from megatron_powerflow.records import ROLLOUT_COLUMNS

RESIDUAL_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LENGTH_QUARTERS = 4
MAX_LOG_PROB = 1e-3  # a log-prob above it exceeds 0 by more than rounding: the kernel is broken


@dataclass(frozen=True, slots=True)
class ReductionSettings:
    """Holds what the metrics need to know of the run and of its target distribution.

    responses_per_prompt: rollouts in a group. alpha: the target's power; None where the objective has none. tilt_cap:
    in tokens; None where every token is paid.
    """

    responses_per_prompt: int
    max_response_tokens: int
    alpha: float | None = None
    tilt_cap: int | None = None
    has_tilt: bool = False  # the objective's fixed point is p_base^alpha exp(-lambda |y|)
    energy_per_token: bool = False  # psi and the task's reward count once a token, not once a response
    learns_log_z: bool = True  # log Z' comes from a head; False: from the group itself, or there is none
    has_lag: bool = False  # rollouts may be by earlier weights of this run


def reduce_rollouts(rows: np.ndarray, settings: ReductionSettings) -> dict[str, float]:
    """Returns the metrics of a step. rows: [B, len(ROLLOUT_COLUMNS)] fp64, read only.

    Logarithms are natural, lengths in tokens. Means are over kept rollouts unless the name says token or prompt, or a
    comment beside the metric says otherwise. A metric that does not exist in this step is absent, never NaN. Raises
    FloatingPointError when a log-prob is above 0: the numbers of such a step mean nothing.
    """
    every = {name: rows[:, column] for column, name in enumerate(ROLLOUT_COLUMNS)}
    every["sampled_sequence_log_prob"] = _by_what_sampled(every)
    highest = every["max_log_prob"].max(initial=-np.inf)
    if highest > MAX_LOG_PROB:
        raise FloatingPointError(f"a token has log-prob {highest:.4g}; probabilities end at 1, the scorer is broken")
    values = _rollout_metrics(every, settings) | length_statistics(every, settings.responses_per_prompt)
    kept = _kept_columns(every, settings)
    if len(kept["kept"]):
        values |= _objective_metrics(kept, settings)
        values |= _realised_metrics(kept, settings)
        values |= _power_metrics(kept, settings.alpha) if settings.alpha is not None else {}
        values |= _trap_metrics(every, settings) if settings.has_tilt else {}
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def _by_what_sampled(every: dict[str, np.ndarray]) -> np.ndarray:
    """Returns [B] the log-prob of each response under the policy that sampled it.

    It is the trainer's at the start of the step where that has the sampler's weights, else the sampler's own.
    """
    return np.where(every["lag_max"] == 0, every["old_sequence_log_prob"], every["rollout_sequence_log_prob"])


def reduce_trained(rows: np.ndarray, settings: ReductionSettings) -> dict[str, float]:
    """Returns the metrics of the objective over all that a step trained on, where that is more than its own rollouts.

    rows: as in `reduce_rollouts`, of the rollouts of all steps. num_rollouts_trained counts them.
    """
    every = {name: rows[:, column] for column, name in enumerate(ROLLOUT_COLUMNS)}
    kept = _kept_columns(every, settings)
    values = {"num_rollouts_trained": float(len(rows)), "num_rollouts_kept": every["kept"].sum()}
    values |= _apart(every, "staleness", every["lag_max"] != 0) | _lag_metrics(every)
    if len(kept["kept"]):
        values |= _objective_metrics(kept, settings)
    return {name: float(value) for name, value in values.items() if np.isfinite(value)}


def _kept_columns(every: dict[str, np.ndarray], settings: ReductionSettings) -> dict[str, np.ndarray]:
    """Returns the columns of the kept rollouts, and which prompt each belongs to."""
    kept = {name: column[every["kept"] > 0] for name, column in every.items()}
    kept["prompt"] = kept["rollout_index"] // settings.responses_per_prompt
    return kept


def _rollout_metrics(every: dict[str, np.ndarray], settings: ReductionSettings) -> dict[str, float]:
    """Returns the metrics of all sampled responses, dropped ones included."""
    lengths, num_tokens = every["num_response_tokens"], every["num_response_tokens"].sum()
    old, sampled = every["old_sequence_log_prob"], every["sampled_sequence_log_prob"]
    ref = every["ref_sequence_log_prob"]
    same_weights = every["lag_max"] == 0
    against_sampler = every["sequence_log_prob"] - every["rollout_sequence_log_prob"]
    sequence_ratio = np.exp(np.clip(against_sampler, -50.0, 50.0))
    return {
        "num_rollouts": float(len(lengths)),
        "num_rollouts_kept": every["kept"].sum(),
        "num_prompt_tokens": every["num_prompt_tokens"].sum(),
        "num_response_tokens": num_tokens,
        # over all rollouts
        "response_length_mean": lengths.mean(),
        "response_length_max": lengths.max(),
        "response_length_p95": np.quantile(lengths, 0.95),
        "truncated_fraction": every["truncated"].mean(),
        "eos_fraction": 1.0 - every["truncated"].mean(),
        "boxed_rate": every["boxed"].mean(),
        "repeated_share": every["repeated_share"].mean(),  # of a response's 4-grams, those it has had before
        "loop_fraction": has_loop(every["loop_tokens"], settings.max_response_tokens).mean(),
        "distinct_2": every["distinct_2"].mean(),
        "distinct_3": every["distinct_3"].mean(),
        # over the rollouts whose prompt has an answer
        "accuracy": _mean(every["correct"]),
        # over response tokens of all rollouts; entropy and KL are of the policy that sampled: its samples estimate them
        "policy_entropy": -sampled.sum() / num_tokens,  # nats per token
        "ref_log_prob_mean": ref.sum() / num_tokens,
        "kl_per_token": (sampled - ref).sum() / num_tokens,
        # over all rollouts
        "kl_per_response": (sampled - ref).mean(),  # KL(policy || base)
        # over the rollouts whose sampler had the weights that the step starts with; and over those where it had not
        **_apart(every, "sampler_gap", same_weights),
        "token_ratio_mean": _per_token(every, "token_ratio_sum", same_weights),  # scorer / sampler; 1 when they agree
        **_apart(every, "staleness", ~same_weights),
        **(_lag_metrics(every) if settings.has_lag else {}),
        # over all rollouts
        "stale_nats_mean": np.abs(every["sequence_log_prob"] - old).mean(),  # |S - S_old|: how far training has moved
        # exp(S - S_sampler): sampler gap and staleness together
        "sequence_ratio_mean": sequence_ratio.mean(),
        "effective_sample_share": _effective_share(sequence_ratio),
    }


def _apart(every: dict[str, np.ndarray], name: str, rollouts: np.ndarray) -> dict[str, float]:
    """Returns how far the trainer at the start of the step is from the sampler; NaN where nobody can say.

    name: of the columns, sampler_gap or staleness. rollouts: [B] bool, those that have these columns.
    """
    apart = np.abs(every["old_sequence_log_prob"] - every["rollout_sequence_log_prob"])
    apart = np.where(np.isnan(every[f"{name}_sum"]), np.nan, apart)[rollouts]
    return {
        f"{name}_mean": _per_token(every, f"{name}_sum", rollouts),  # |scorer - sampler|
        f"{name}_max": every[f"{name}_max"][rollouts].max(initial=-np.inf),
        f"{name}_kl": _per_token(every, f"{name}_kl_sum", rollouts),  # KL(sampler || trainer)
        # over these rollouts: |S_old - S_sampler|, what a sequence weight would feel
        f"{name}_sequence_mean": apart.mean() if len(apart) else np.nan,
        f"{name}_sequence_max": apart.max(initial=-np.inf),
    }


def _per_token(every: dict[str, np.ndarray], column: str, rollouts: np.ndarray) -> float:
    """Returns the sum of a column over these rollouts / their response tokens; NaN without any."""
    num_tokens = every["num_response_tokens"][rollouts].sum()
    return every[column][rollouts].sum() / num_tokens if num_tokens else np.nan


def _lag_metrics(every: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns how many steps old the weights are that wrote the responses."""
    return {
        "lag_mean": every["lag_sum"].sum() / every["num_response_tokens"].sum(),  # over response tokens
        "lag_max": every["lag_max"].max(),
        "mixed_versions": (every["num_versions"] > 1).mean(),  # over rollouts
    }


def _objective_metrics(kept: dict[str, np.ndarray], settings: ReductionSettings) -> dict[str, float]:
    """Returns the metrics of the objective: means over kept rollouts; of log Z', over prompts."""
    residual, weight, prompts = kept["residual"], kept["weight"], kept["prompt"]
    head = _per_prompt(kept["log_z"], prompts)
    estimate = _per_prompt(kept["log_z"] - residual, prompts)  # minus the mean of (S - alpha S_ref)/n - alpha psi
    return {
        "loss": kept["loss_term"].mean(),
        "residual_mean": residual.mean(),
        "residual_std": residual.std(),
        **{f"residual_p{int(100 * q):02d}": np.quantile(residual, q) for q in RESIDUAL_QUANTILES},
        **_by_length(residual, kept["num_response_tokens"]),
        "weighted_residual_mean": (weight * residual).mean(),  # E[w delta]: 0 where log Z' is stationary
        "log_z_mean": head.mean(),
        "log_z_std": head.std(),
        "group_log_z_mean": estimate.mean(),
        "group_log_z_std": estimate.std(),
        # of a head: the group's own estimate explains itself
        "log_z_explained_variance": _explained_variance(estimate, head) if settings.learns_log_z else np.nan,
        "weight_mean": weight.mean(),
        "ratio_mean": kept["ratio"].mean(),
        "clip_fraction": kept["clipped"].mean(),
        "importance_effective_share": _effective_share(kept["importance"]),  # of w v
        "sampler_weight_mean": kept["sampler_weight"].mean(),  # v
        "sampler_weight_effective_share": _effective_share(kept["sampler_weight"]),
        "sampler_truncated_fraction": kept["sampler_truncated"].mean(),
        "psi_mean": kept["psi"].mean(),
        "reward_mean": kept["reward"].mean(),
        "advantage_std": kept["advantage"].std(),
    }


def _power_metrics(kept: dict[str, np.ndarray], alpha: float) -> dict[str, float]:
    """Returns how the policy compares with p_base^alpha."""
    self_reward = kept["ref_sequence_log_prob"] / kept["num_response_tokens"]
    judged = np.isfinite(kept["correct"])
    values = {"alpha": alpha, "inversion_rate": _inversion_rate(kept, alpha)}
    if judged.any():
        values["self_reward_covariance"] = _covariance_within(
            self_reward[judged], kept["correct"][judged], kept["prompt"][judged]
        )
    return values


def _realised_metrics(kept: dict[str, np.ndarray], settings: ReductionSettings) -> dict[str, float]:
    """Returns which power of the base model the responses show: see `realised_alpha.py`."""
    lengths, added = kept["num_response_tokens"], np.zeros(len(kept["kept"]))
    counted = lengths if settings.tilt_cap is None else np.minimum(lengths, settings.tilt_cap)
    if settings.alpha is not None:
        added = energy_per_token(kept, settings.alpha)
        added = added * counted if settings.energy_per_token else added
    sampled, ref = kept["sampled_sequence_log_prob"], kept["ref_sequence_log_prob"]
    return realised_alpha(sampled, ref, counted, kept["prompt"], added)


def _trap_metrics(every: dict[str, np.ndarray], settings: ReductionSettings) -> dict[str, float]:
    """Returns whether the target rewards the loops among the rollouts: see `trap.py`."""
    assert settings.alpha is not None, "the tilt is one of p_base^alpha"
    return trap_metrics(
        every,
        every["sampled_sequence_log_prob"],
        responses_per_prompt=settings.responses_per_prompt,
        max_response_tokens=settings.max_response_tokens,
        alpha=settings.alpha,
        tilt_cap=settings.tilt_cap,
    )


def _by_length(residual: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Returns the mean residual of each quarter of the rollouts, shortest first: a slope is a bias on length."""
    order = lengths.argsort(kind="stable")
    parts = np.array_split(residual[order], LENGTH_QUARTERS)
    return {f"residual_length_q{number}": part.mean() for number, part in enumerate(parts, start=1) if len(part)}


def _explained_variance(estimate: np.ndarray, head: np.ndarray) -> float:
    """Returns 1 - var(estimate - head) / var(estimate) over prompts; NaN where the estimates do not vary."""
    variance = estimate.var()
    return 1.0 - (estimate - head).var() / variance if variance > 1e-12 else np.nan


def _inversion_rate(kept: dict[str, np.ndarray], alpha: float) -> float:
    """Returns the share of pairs of one prompt's responses that the policy that sampled ranks against p_base^alpha.

    Ties are no pair.
    The pair (i, j) is inverted when S_i - S_j and alpha (S_ref,i - S_ref,j) have opposite signs; at the tilted optimum
    this is sign(alpha d log p_base) != sign(alpha d log p_base - lambda d|y|).
    """
    inverted = pairs = 0
    for prompt in np.unique(kept["prompt"]):
        group = kept["prompt"] == prompt
        policy, power = kept["sampled_sequence_log_prob"][group], alpha * kept["ref_sequence_log_prob"][group]
        product = np.sign(policy[:, None] - policy) * np.sign(power[:, None] - power)
        inverted += (product < 0).sum() / 2
        pairs += (product != 0).sum() / 2
    return inverted / pairs if pairs else np.nan


def _covariance_within(first: np.ndarray, second: np.ndarray, prompts: np.ndarray) -> float:
    """Returns the unbiased covariance among a prompt's responses, averaged over prompts; NaN without a prompt of two.

    A prompt weighs n - 1, so this is the sum of centred products over the sum of n - 1. Differences between prompts are
    left out: easy prompts have both likely and right responses, and that says nothing of what sharpening does.
    """
    _, prompt_index, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    centred = [values - (np.bincount(prompt_index, values) / counts)[prompt_index] for values in (first, second)]
    freedom = (counts - 1).sum()
    return (centred[0] * centred[1]).sum() / freedom if freedom else np.nan


def _effective_share(weights: np.ndarray) -> float:
    """Returns the effective sample size of the weights as a share of their number: (sum w)^2 / (B sum w^2)."""
    squares = (weights**2).sum()
    return weights.sum() ** 2 / (len(weights) * squares) if squares else np.nan


def _mean(values: np.ndarray) -> float:
    """Returns the mean of the finite values; NaN without any."""
    finite = values[np.isfinite(values)]
    return finite.mean() if len(finite) else np.nan


def _per_prompt(values: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Returns [Q] the mean over the kept rollouts of each prompt. values, prompts: [B]."""
    _, prompt_index = np.unique(prompts, return_inverse=True)
    return np.bincount(prompt_index, values) / np.bincount(prompt_index)
