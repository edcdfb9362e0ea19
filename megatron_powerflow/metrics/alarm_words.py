"""Which alarms does this run listen to, and what does it tell its user? Beside the tests themselves (`alarm.py`)."""

from __future__ import annotations

from megatron_powerflow.config import Config
from megatron_powerflow.metrics.alarm import ALARMS, Thresholds

# |scorer - sampler|, mean over tokens. Seen: fp32 at most 4e-5 on any token, bf16 .042; fp8 is not measured.
SAMPLER_GAP = {"fp32": 1e-3, "bf16": 0.15, "fp8": 0.3}

ADVICE = {
    "length": "The target may reward repetition: see the README on lower limits, objective.tilt_cap and "
    "objective.alpha_warmup_steps",
    "short": "The objective may pay for fewer tokens (tb_traj does): see objective.form, or continue from an earlier "
    "checkpoint",
    "loss": "The policy diverges: lower optimizer.lr and start again",
    "sampler_gap": "Sampler and scorer disagree on the same weights: look at precision and at the engine before "
    "trusting this run",
    "nothing_kept": "Raise rollout.max_response_tokens, or set objective.truncated=keep",
}


def thresholds_of(config: Config) -> Thresholds:
    """No bound of the gap under replay: the policy that scores may be another one than the one that sampled."""
    section = config.alarm
    bound = section.sampler_gap or SAMPLER_GAP[config.precision.dtype]
    return Thresholds(
        truncated_rise=section.truncated_rise,
        length_rise=section.length_rise,
        length_fall=section.length_fall,
        loss_growth=section.loss_growth,
        sampler_gap=None if config.rollout.replay is not None else bound,
        nothing_kept_steps=section.nothing_kept_steps,
    )


def alarms_that_end_run(config: Config) -> frozenset[str]:
    """The alarms that end the run."""
    asked = config.run.stop_on_alarm
    return frozenset(asked) if isinstance(asked, list) else frozenset(ALARMS if asked else ())
