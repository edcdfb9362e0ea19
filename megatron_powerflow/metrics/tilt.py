"""How much does the target pay for a token? The lambda of each prompt, over its rollouts without loops.

The target of a length-normalised objective is exp(energy - lambda m), with m = min(n, tilt cap) and

    energy = alpha S_ref + (alpha psi + reward) m            (what `objective/trajectory_balance.py` balances S against)

lambda is what makes the ordinary responses, those without a loop, sum to 1. It is the number that tells whether a loop
outweighs them (`trap.py`), and not the lambda of the fixed point, which pays for the loops' share too. A prompt's own
is the root of

    (1 / G) sum over its ordinary rollouts of exp(energy - S - lambda m) = 1        importance sampling from the policy

with G all rollouts of the prompt, since S is a log-prob among all responses. On rollouts of the target itself every
term is 1 and the root is exact; far from it one or two terms are the whole sum, which the effective sample size tells:
(sum w)^2 / sum w^2. Prompts are not pooled, as the smallest |lambda| among them would rule the sum.

Left out: the margin, and what to report where the estimate is worth nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BISECTIONS = 60


class PromptTilts(NamedTuple):
    """Holds the lambda of each prompt that has an ordinary rollout, by ascending number of the prompt; all are [P].

    prompt: the number. lam: lambda, nats per token. effective: the effective number of samples that the root rests on,
    from 1 to the number of the prompt's ordinary rollouts.
    """

    prompt: np.ndarray
    lam: np.ndarray
    effective: np.ndarray


def energy_per_token(columns: Mapping[str, np.ndarray], alpha: float) -> np.ndarray:
    """Returns [B] alpha psi + reward, nats per counted token. columns: ROLLOUT_COLUMNS, [B] each.

    Where there is no residual, as in rl_token, `reward` is the policy gradient's own, the log-ratio of target and
    policy, and no energy.
    """
    return alpha * columns["psi"] + np.where(np.isfinite(columns["residual"]), columns["reward"], 0.0)


def prompt_tilts(
    energy: np.ndarray, sequence_log_prob: np.ndarray, counted: np.ndarray, prompt: np.ndarray, ordinary: np.ndarray
) -> PromptTilts:
    """Returns the lambda of each prompt, by bisection.

    All arguments are [B], over all rollouts of a step. energy: as in the module's formula, nats; sequence_log_prob: S
    of the policy that sampled; counted: m >= 1; prompt: the number of the rollout's prompt; ordinary: bool, kept and
    without a loop.
    """
    names, prompt_index = np.unique(prompt, return_inverse=True)
    group_size = np.bincount(prompt_index)
    present = np.unique(prompt_index[ordinary])
    prompt_index = np.searchsorted(present, prompt_index[ordinary])
    names, log_size = names[present], np.log(group_size[present])
    excess, counted = (energy - sequence_log_prob)[ordinary], counted[ordinary]

    def largest(values: np.ndarray) -> np.ndarray:
        out = np.full(len(present), -np.inf)
        with np.errstate(invalid="ignore"):  # of a policy whose log-probs are no numbers
            np.maximum.at(out, prompt_index, values)
        return out

    def weights(lam: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (exp(exponent - the prompt's largest), that largest)."""
        exponent = excess - lam[prompt_index] * counted
        top = largest(exponent)
        return np.exp(exponent - top[prompt_index]), top

    # at `high` no term is above 1; at `low` one of them alone is G
    low, high = largest((excess - log_size[prompt_index]) / counted), largest(excess / counted)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        weight, top = weights(middle)
        above = top + np.log(np.bincount(prompt_index, weight, len(present))) > log_size
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    lam = (low + high) / 2
    weight, _ = weights(lam)
    effective = np.bincount(prompt_index, weight, len(present)) ** 2 / np.bincount(
        prompt_index, weight**2, len(present)
    )
    return PromptTilts(names, lam, effective)
