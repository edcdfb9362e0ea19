"""What is a metric called in pictures and tables? This is the one table of names; files keep the short keys.

Left out: which metrics are shown where.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Metric:
    """Names a metric and its unit for people. Example: "mean response length", "tokens".

    share: the metric is a number from 0 to 1, and its axis ends there.
    """

    name: str
    unit: str = ""
    share: bool = False


METRICS = {
    # how good the responses are
    "accuracy": Metric("accuracy", share=True),
    "maj": Metric("majority accuracy", share=True),
    "pass_at": Metric("pass@k", share=True),
    "quality": Metric("judged quality", share=True),
    # how long, and whether they come to an end
    "truncated_fraction": Metric("truncated share", share=True),
    "boxed_rate": Metric("share with a boxed answer", share=True),
    "response_length_mean": Metric("mean response length", "tokens"),
    "response_length_p95": Metric("95 % quantile of response length", "tokens"),
    # how different
    "distinct_1": Metric("distinct-1", share=True),
    "distinct_2": Metric("distinct-2", share=True),
    "distinct_3": Metric("distinct-3", share=True),
    "self_bleu": Metric("self-BLEU", share=True),
    "embedding_distance": Metric("mean embedding distance"),
    "strategies": Metric("judged variety of strategies"),
    # how far from the base model
    "kl_per_response": Metric("KL to the base model", "nats per response"),
    "ref_log_prob_mean": Metric("base model's log-prob", "nats per token"),
    "policy_entropy": Metric("policy entropy", "nats per token"),
    "alpha": Metric("asked alpha"),
    "alpha_realised": Metric("realised alpha"),
    "alpha_realised_low": Metric("realised alpha, lower end of the 95 % interval"),
    "alpha_realised_high": Metric("realised alpha, upper end of the 95 % interval"),
    "alpha_realised_r2": Metric("R² of the realised alpha"),
    # the objective
    "loss": Metric("loss"),
    "grad_norm": Metric("gradient norm"),
    "residual_mean": Metric("mean residual"),
    "residual_std": Metric("standard deviation of the residual"),
    "residual_p05": Metric("5 % quantile of the residual"),
    "residual_p25": Metric("25 % quantile of the residual"),
    "residual_p50": Metric("median residual"),
    "residual_p75": Metric("75 % quantile of the residual"),
    "residual_p95": Metric("95 % quantile of the residual"),
    "weighted_residual_mean": Metric("weighted mean residual"),
    "log_z_mean": Metric("log Z′"),
    "group_log_z_mean": Metric("the group's estimate of log Z′"),
    "trap_margin": Metric("trap margin", "nats"),
    "trap_lambda": Metric("trap: λ without the loops", "nats per token"),
    "trap_loop_nats": Metric("trap: cost of the loop", "nats per token"),
    "trap_entry_nats": Metric("trap: cost of entering the loop", "nats"),
    # the machine
    "tokens_per_second": Metric("response tokens per second"),
    "rollout_tokens_per_second": Metric("response tokens per second of sampling"),
    "sampler_gap_mean": Metric("mean gap of sampler and scorer", "nats per token"),
    "sampler_gap_max": Metric("largest gap of sampler and scorer", "nats"),
    "sync_gap_mean": Metric("mean gap of servers and trainer on fixed texts", "nats per token"),
    "sync_gap_max": Metric("largest gap of servers and trainer on fixed texts", "nats"),
    "lag_mean": Metric("mean lag of the sampler's weights", "steps"),
    "lag_max": Metric("largest lag of the sampler's weights", "steps"),
}


def label(key: str) -> str:
    """Returns the text for an axis, a legend or a column's head. Example: mean response length (tokens)."""
    metric = METRICS[key]
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def heading(key: str) -> str:
    """Returns the text for the title of a panel. Example: Mean response length (tokens)."""
    text = label(key)
    return text if text.startswith("log ") else text[0].upper() + text[1:]
