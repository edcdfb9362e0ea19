"""How fast does a run learn at each step? The rates are functions of the step: no scheduler is saved."""

from __future__ import annotations

import math

from megatron_powerflow.config import OptimizerSection


def learning_rates(section: OptimizerSection, step: int, num_steps: int) -> tuple[float, float | None]:
    """Return the learning rate of the policy and the log Z' head's at a step (0-based).

    The head's is None where nobody learns log Z'. min_lr bounds the policy's decay, not its warm-up.
    """
    share = decay(section, step, num_steps)
    lr = section.lr * share
    if step >= section.warmup_steps:
        lr = max(lr, section.min_lr or 0.0)
    return lr, None if section.log_z_lr is None else section.log_z_lr * share


def decay(section: OptimizerSection, step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at a step (0-based).

    It is a linear warm-up, then constant, or linear or cosine to 0.
    """
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(1, num_steps - section.warmup_steps)
    return {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[section.lr_decay]
