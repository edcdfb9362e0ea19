"""What does one step minimise? One value holds everything that a loss depends on beside the rollouts, resolved.

    BalanceObjective          trajectory balance: form, alpha, who says log Z', the weights w and v
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
    """How responses of an older policy are weighted.

    ratio: what the importance weight w = exp(S - S_old) is taken of; "none": w is 1. w is clipped to 1 - epsilon,
    ..., 1 + epsilon, or with upper_only to at most 1 + epsilon.
    """

    ratio: Ratio
    epsilon: float = 0.0
    upper_only: bool = False


@dataclass(frozen=True, slots=True)
class SamplerRule:
    """How responses are weighted that another sampler drew than the trainer at the start of the step.

    ratio: what v = min(trainer at the start / sampler, cap) is taken of; "none": v is 1. cap: at least 1.
    """

    ratio: Ratio
    cap: float = 1.0


@dataclass(frozen=True, slots=True)
class BalanceObjective:
    """Trajectory balance (Eq. 10, arXiv 2603.18363, and its other normalisations).

    alpha: the power of the base model that this step aims at. log_z: who says log Z', a learned head or an estimate of
    the group. tilt_cap: the residual counts at most so many tokens of a response; None: all. sampler: never per token.
    """

    form: Balance
    alpha: float
    log_z: LogZ
    importance: ImportanceRule
    tilt_cap: int | None = None
    sampler: SamplerRule = SamplerRule("none")

    @property
    def learns_log_z(self) -> bool:
        """Whether a learned head says log Z'."""
        return self.log_z in LEARNED_LOG_Z


@dataclass(frozen=True, slots=True)
class PolicyGradientObjective:
    """The policy gradient of a reward's advantage within its group.

    alpha: the power of the base model; None unless the reward is made of log-probs. kl_coefficient: what
    KL(policy || base) is multiplied by in the loss; 0: no such term.
    """

    form: PolicyGradient
    alpha: float | None
    importance: ImportanceRule
    kl_coefficient: float = 0.0
    sampler: SamplerRule = SamplerRule("none")

    @property
    def learns_log_z(self) -> bool:
        """Whether a learned head says log Z'."""
        return False


@dataclass(frozen=True, slots=True)
class EntropyObjective:
    """The minimum of the policy's entropy. kl_coefficient: what KL(policy || base) is multiplied by; 0: no term."""

    kl_coefficient: float = 0.0

    @property
    def alpha(self) -> None:
        """None: there is no target."""
        return None

    @property
    def learns_log_z(self) -> bool:
        """Whether a learned head says log Z'."""
        return False


Objective = BalanceObjective | PolicyGradientObjective | EntropyObjective
