"""Which objective does `objective.preset` name? Every preset is a row of settings, and the formulas are written once.

    Balance          loss = w m (log Z' + S / a - alpha S_ref / c - alpha psi - beta r)^2    trajectory balance
    PolicyGradient   loss = -A S / a, A the advantage of a reward within its group           RL ablations, rivals
    EntropyMinimum   loss = mean entropy of the tokens of a response                          one-shot EM

S and S_ref are the response's log-probs by policy and reference; a, c and m are 1 or the length n. The source is named
at each row.

Left out: the formulas (`objective/`), the rewards of text (`training/rewards.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Norm = Literal["none", "length"]
LogZ = Literal["mlp", "scalar", "group", "loo", "contrastive"]  # who says log Z'(q)
LearnedLogZ = Literal["mlp", "scalar"]  # a learned head says it; the others are estimates of the group
LEARNED_LOG_Z: tuple[LearnedLogZ, ...] = get_args(LearnedLogZ)
Ratio = Literal["none", "seq", "seq_mean", "token"]  # what an importance weight is taken of


@dataclass(frozen=True, slots=True)
class Balance:
    """Trajectory balance in one of its normalisations.

    policy_norm, reference_norm: what S and S_ref are divided by. weight: m. per_token: each token's residual is
    squared and the squares are averaged over the response, instead of squaring the average.
    """

    policy_norm: Norm
    reference_norm: Norm
    weight: Norm = "none"
    per_token: bool = False

    @property
    def per_length(self) -> bool:
        """Whether log Z', psi and the task's reward are numbers per token."""
        return self.policy_norm == "length" or self.per_token

    @property
    def tilts(self) -> bool:
        """Whether the fixed point is tilted by length: p_base^alpha exp(-lambda n)."""
        return self.policy_norm == self.reference_norm == "length" and not self.per_token


# power: alpha S_ref - S + alpha psi, the log-ratio to the target; power_per_token: (alpha S_ref - S) / n + alpha psi;
# the others are made of text
Reward = Literal["power", "power_per_token", "gold", "cluster", "majority", "certainty", "boxed"]


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """The policy gradient of a reward's advantage A within its group.

    divide_by_std: A = (r - mean) / (std + 1e-6), as in GRPO; else r - mean. score_norm: what S is divided by.
    """

    reward: Reward
    divide_by_std: bool
    score_norm: Norm

    @property
    def powers(self) -> bool:
        """Whether the reward is made of log-probs, under the alpha-power of the reference."""
        return self.reward in ("power", "power_per_token")

    @property
    def per_length(self) -> bool:
        """Whether psi is a number per token."""
        return self.reward == "power_per_token"

    @property
    def tilts(self) -> bool:
        """Whether the fixed point is tilted by length: p_base^alpha exp(-lambda n)."""
        return self.per_length


@dataclass(frozen=True, slots=True)
class EntropyMinimum:
    """The minimum of the entropy itself, with no reward and no target."""

    per_length = tilts = False


Form = Balance | PolicyGradient | EntropyMinimum

PresetName = Literal[
    "la_tb",
    "tb_traj",
    "tb_token_target",
    "tb_token_score",
    "tb_token_step",
    "flow_rl",
    "rl_traj",
    "rl_token",
    "grpo",
    "empo",
    "ttrl",
    "intuitor",
    "format_only",
    "one_shot_em",
]  # the keys of PRESETS, in their order, where a type is asked for
PRESETS: dict[str, Form] = {
    # length-aware trajectory balance: Eq. 10, arXiv 2603.18363; fixed point p_base^alpha exp(-lambda |y|)
    "la_tb": Balance("length", "length"),
    # trajectory balance: Eq. 5; fixed point p_base^alpha / Z
    "tb_traj": Balance("none", "none"),
    # three readings of the paper's "TB-token", whose loss it does not print
    "tb_token_target": Balance("none", "length"),
    "tb_token_score": Balance("length", "length", weight="length"),
    "tb_token_step": Balance("length", "length", per_token=True),
    # alpha = 1 and an advantage in the energy: arXiv 2509.15207, whose coefficient is 15
    "flow_rl": Balance("length", "length"),
    # policy gradient towards the alpha-power: optimum p_base^alpha / Z (arXiv 2605.04542); the same with reward / n
    "rl_traj": PolicyGradient("power", divide_by_std=False, score_norm="none"),
    "rl_token": PolicyGradient("power_per_token", divide_by_std=False, score_norm="none"),
    # rivals: the reward differs, nothing else. Advantage and 1/n as in GRPO, arXiv 2402.03300
    "grpo": PolicyGradient("gold", divide_by_std=True, score_norm="length"),
    "empo": PolicyGradient("cluster", divide_by_std=True, score_norm="length"),  # arXiv 2504.05812
    "ttrl": PolicyGradient("majority", divide_by_std=True, score_norm="length"),  # arXiv 2504.16084
    "intuitor": PolicyGradient("certainty", divide_by_std=True, score_norm="length"),  # arXiv 2505.19590
    "format_only": PolicyGradient("boxed", divide_by_std=True, score_norm="length"),
    "one_shot_em": EntropyMinimum(),  # arXiv 2505.20282
}
