"""Which objective does a step have? The config's keys, and alpha where it still rises, as one `Objective`."""

from __future__ import annotations

from megatron_powerflow.config import ObjectiveSection
from megatron_powerflow.objective.objective import (
    BalanceObjective,
    EntropyObjective,
    ImportanceRule,
    Objective,
    PolicyGradientObjective,
    SamplerRule,
)
from megatron_powerflow.objective.presets import Balance, PolicyGradient


def objective_of_step(section: ObjectiveSection, step: int) -> Objective:
    """Return the objective of a step.

    section: resolved, as `config_file.parse_config` leaves it. step: counted from 0.
    """
    form, alpha = section.form, alpha_of_step(section, step)
    if isinstance(form, Balance):
        assert alpha is not None and section.log_z is not None
        importance, sampler = importance_rule(section), sampler_rule(section)
        return BalanceObjective(form, alpha, section.log_z, importance, section.tilt_cap, sampler)
    if isinstance(form, PolicyGradient):
        importance, sampler = importance_rule(section), sampler_rule(section)
        return PolicyGradientObjective(form, alpha, importance, section.kl_coefficient or 0.0, sampler)
    return EntropyObjective(section.kl_coefficient or 0.0)


def alpha_of_step(section: ObjectiveSection, step: int) -> float | None:
    """Return the power of the base model that a step aims at; None for an objective that aims at no power.

    It rises linearly from 1 to objective.alpha over objective.alpha_warmup_steps, then stays. step: counted from 0.
    """
    warmup_steps = section.alpha_warmup_steps or 0
    if section.alpha is None or step + 1 >= warmup_steps:
        return section.alpha
    return 1.0 + (section.alpha - 1.0) * (step + 1) / warmup_steps


def importance_rule(section: ObjectiveSection) -> ImportanceRule:
    """Return the rule that objective.ratio, objective.clip_epsilon and objective.clip make."""
    return ImportanceRule(section.ratio or "none", section.clip_epsilon or 0.0, section.clip == "upper")


def sampler_rule(section: ObjectiveSection) -> SamplerRule:
    """Return the rule that objective.sampler_ratio and objective.sampler_ratio_cap make."""
    return SamplerRule(section.sampler_ratio, section.sampler_ratio_cap or 1.0)
