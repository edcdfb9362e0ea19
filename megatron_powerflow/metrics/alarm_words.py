"""Which bounds do a run's alarms have, what does each advise, and which of them end the run?

Left out: the tests themselves (`alarm.py`).
"""

from __future__ import annotations

from megatron_powerflow.config import Config
from megatron_powerflow.metrics.alarm import ALARMS, Thresholds

# Bounds of |scorer - sampler|, nats, mean over tokens. Measured: fp32 at most 4e-5 on any token, bf16 .042; not fp8.
SAMPLER_GAP = {"fp32": 1e-3, "bf16": 0.15, "fp8": 0.3}

ADVICE = {
    "length": "The target may reward repetition: set objective.tilt_cap just above the length of a good answer, lower "
    "rollout.max_response_tokens, or raise objective.alpha_warmup_steps, and start again in another run.output_dir",
    "short": "The objective may pay for fewer tokens (tb_traj does): start anew in another run.output_dir with another "
    "objective.preset; `powerflow export` writes an earlier checkpoint",
    "loss": "The policy diverges: start anew in another run.output_dir with a lower optimizer.lr; `powerflow export` "
    "writes an earlier checkpoint",
    "sampler_gap": "Sampler and scorer disagree on the same weights: look at precision and at the engine before "
    "trusting this run. Of a server a tensor may not have arrived; a gap that its dtype explains is weighed by "
    "objective.sampler_ratio, with alarm.sampler_gap above it",
    "nothing_kept": "Raise rollout.max_response_tokens, or set objective.truncated=keep",
}


def thresholds_of(config: Config) -> Thresholds:
    """Returns the bounds of a run's alarms.

    Under replay there is no bound of the sampler gap: the policy that scores may differ from the one that sampled.
    """
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
    """Returns the alarms that end the run, by run.stop_on_alarm."""
    stop_on_alarm = config.run.stop_on_alarm
    return frozenset(stop_on_alarm) if isinstance(stop_on_alarm, list) else frozenset(ALARMS if stop_on_alarm else ())
