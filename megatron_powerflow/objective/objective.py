"""What does one step minimise? Everything that a loss depends on beside the rollouts, resolved, as one value.

    BalanceObjective          trajectory balance: form, alpha, who says log Z', the importance weight
    PolicyGradientObjective   a reward's advantage: form, alpha of a reward that is made of log-probs, clip
    EntropyObjective          the entropy itself

A step resolves its config to one of these once (`training/objective_of_step.py`); the way from there to Eq. 10 is
step -> update -> loss -> residual.

Left out: the formulas (`trajectory_balance.py`, `policy_gradient.py`, `log_z_estimate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_powerflow.objective.presets import LEARNED_LOG_Z, Balance, LogZ, PolicyGradient, Ratio


@dataclass(frozen=True, slots=True)
class ImportanceRule:
    """ratio: what the importance weight w = exp(S - S_old) is taken of; "none": w is 1. w is clipped to 1 +- epsilon,
    or with upper_only to at most 1 + epsilon."""

    ratio: Ratio
    epsilon: float = 0.0
    upper_only: bool = False


@dataclass(frozen=True, slots=True)
class BalanceObjective:
    """alpha: the power of the base model that this step aims at. log_z: who says log Z', a learned head or an estimate
    of the group. tilt_cap: lengths count up to this in the residual; None: no cap."""

    form: Balance
    alpha: float
    log_z: LogZ
    importance: ImportanceRule
    tilt_cap: int | None = None

    @property
    def learns_log_z(self) -> bool:
        return self.log_z in LEARNED_LOG_Z


@dataclass(frozen=True, slots=True)
class PolicyGradientObjective:
    """alpha: None unless the reward is made of log-probs. kl_coefficient: of KL(policy || base); 0: no such term."""

    form: PolicyGradient
    alpha: float | None
    importance: ImportanceRule
    kl_coefficient: float = 0.0

    @property
    def learns_log_z(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class EntropyObjective:
    """kl_coefficient: of KL(policy || base); 0: no such term."""

    kl_coefficient: float = 0.0

    @property
    def alpha(self) -> None:
        return None

    @property
    def learns_log_z(self) -> bool:
        return False


Objective = BalanceObjective | PolicyGradientObjective | EntropyObjective
