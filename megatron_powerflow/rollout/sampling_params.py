"""How are the responses of a command drawn? Its config's keys as `SamplingParams`."""

from __future__ import annotations

from megatron_powerflow.config import Config
from megatron_powerflow.records import Purpose, SamplingParams


def sampling_params(
    config: Config,
    stop_token_ids: frozenset[int],
    *,
    step: int = 0,
    purpose: Purpose = Purpose.ROLLOUTS,
    responses_per_prompt: int | None = None,
    temperature: float | None = None,
) -> SamplingParams:
    """Return the sampling parameters of a config, for one step and purpose.

    responses_per_prompt, temperature: instead of those of `rollout` in the config, where they are not None. The random
    numbers are those of run.seed, `step` and `purpose`.
    """
    rollout = config.rollout
    return SamplingParams(
        responses_per_prompt=rollout.responses_per_prompt if responses_per_prompt is None else responses_per_prompt,
        max_response_tokens=rollout.max_response_tokens,
        temperature=rollout.temperature if temperature is None else temperature,
        stop_token_ids=stop_token_ids,
        seed=config.run.seed,
        step=step,
        purpose=purpose,
    )
