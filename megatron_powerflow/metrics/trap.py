"""Will the target reward repetition? The margin of the loops among a step's rollouts.

The target pays -lambda nats for every token (`tilt.py`). A loop costs the base model r nats a token, and c nats once to
enter it. At a limit of N tokens, M = min(N, tilt cap) of which are paid, it has the log-mass

    margin = M (-lambda + alpha psi + reward) - alpha (N r + c)

relative to the ordinary responses, whose masses sum to 1, since lambda is that of the ordinary responses alone. (With
the fixed point's own lambda the margin would be the loop's log-probability there, and never above 0.) The estimate has
one mode: it leaves out the many ways into a loop, and the text before it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_powerflow.metrics.loops import min_loop_tokens
from megatron_powerflow.metrics.tilt import PromptTilts, energy_per_token, prompt_tilts

MIN_EFFECTIVE_SAMPLES = 2.0  # of a prompt, for its lambda to count; with fewer, one rollout decides
MIN_PROMPT_SHARE = 0.5  # of the prompts, which must have a lambda that counts for the step to report one


def trap_metrics(
    columns: Mapping[str, np.ndarray],
    sequence_log_prob: np.ndarray,
    *,
    responses_per_prompt: int,
    max_response_tokens: int,
    alpha: float,
    tilt_cap: int | None,
) -> dict[str, float]:
    """Returns the metrics of lambda and of the margin; a number that rests on too few samples is absent.

    columns: ROLLOUT_COLUMNS, [B] each over all rollouts; sequence_log_prob: [B] S of the policy that sampled them.
    Over prompts: trap_effective_samples (mean over every prompt), and over the prompts that have enough samples, if
    these are half of all, trap_lambda (median), trap_lambda_mean, trap_lambda_std and trap_log_z_gap (median of
    log Z' - lambda).
    Over the kept rollouts with a loop, medians: trap_loop_nats, trap_entry_nats, and trap_margin, each loop at the
    lambda of its prompt, or at the median one where the prompt's own is unknown.
    """
    lengths = columns["num_response_tokens"]
    counted = lengths if tilt_cap is None else np.minimum(lengths, tilt_cap)
    bonus = energy_per_token(columns, alpha)
    energy = alpha * columns["ref_sequence_log_prob"] + bonus * counted
    kept, looping = columns["kept"] > 0, has_loop(columns["loop_tokens"], max_response_tokens)
    prompt = columns["rollout_index"] // responses_per_prompt
    tilts = prompt_tilts(energy, sequence_log_prob, counted, prompt, kept & ~looping)
    names, first = np.unique(prompt, return_index=True)
    lam = _known_lambdas(tilts, names)
    known = np.isfinite(lam)
    values = {"trap_effective_samples": tilts.effective.sum() / len(names)}
    if known.mean() >= MIN_PROMPT_SHARE:
        values |= {
            "trap_lambda": np.median(lam[known]),
            "trap_lambda_mean": lam[known].mean(),
            "trap_lambda_std": lam[known].std(),
            "trap_log_z_gap": np.median((columns["log_z"][first] - lam)[known]),
        }
    loops = kept & looping
    if loops.any():
        nats, entry = columns["loop_nats"][loops], columns["entry_nats"][loops]
        values |= {"trap_loop_nats": np.median(nats), "trap_entry_nats": np.median(entry)}
        if "trap_lambda" in values:
            loop_lambda = lam[np.searchsorted(names, prompt[loops])]
            margins = trap_margin(
                nats,
                entry,
                alpha=alpha,
                tilt=-np.where(np.isfinite(loop_lambda), loop_lambda, values["trap_lambda"]),
                max_response_tokens=max_response_tokens,
                tilt_cap=tilt_cap,
                bonus=bonus[loops],
            )
            values["trap_margin"] = np.median(margins)
    return values


def has_loop(loop_tokens: np.ndarray, max_response_tokens: int) -> np.ndarray:
    """Returns [B] bool: which responses have a loop. loop_tokens: [B] of the longest repetition; NaN without one."""
    return loop_tokens >= min_loop_tokens(max_response_tokens)


def trap_margin(
    loop_nats: np.ndarray | float,
    entry_nats: np.ndarray | float,
    *,
    alpha: float,
    tilt: np.ndarray | float,
    max_response_tokens: int,
    tilt_cap: int | None,
    bonus: np.ndarray | float = 0.0,
) -> np.ndarray | float:
    """Returns [loops] the nats by which a loop of max_response_tokens outweighs the ordinary responses.

    The formula is the module's. tilt: -lambda of the ordinary responses, [loops] or one for all, nats per token; bonus:
    alpha psi + reward, which the loop gets for each paid token, likewise.
    """
    counted = max_response_tokens if tilt_cap is None else min(tilt_cap, max_response_tokens)
    return counted * (tilt + bonus) - alpha * (max_response_tokens * loop_nats + entry_nats)


def _known_lambdas(tilts: PromptTilts, names: np.ndarray) -> np.ndarray:
    """Returns [P] the lambda of each prompt of `names` [P], ascending; NaN where it rests on too few samples."""
    lam = np.full(len(names), np.nan)
    enough = tilts.effective >= MIN_EFFECTIVE_SAMPLES
    lam[np.searchsorted(names, tilts.prompt[enough])] = tilts.lam[enough]
    return lam
