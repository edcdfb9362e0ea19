"""Can the first numbers of a start be trusted? Looked at before the base has cost a rollout, and before an update.

    prompts --base--> finite?     rollouts --base, policy--> finite? does the scorer agree with the sampler?

Both are asked again after every resume: another machine, library or layout may answer otherwise.

Left out: later steps, which are skipped (`skipped.py`) or ring an alarm (`metrics/alarm.py`); the weights themselves
(`hf/finite.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from megatron_powerflow.config import Config
from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.alarm_words import SAMPLER_GAP, thresholds_of
from megatron_powerflow.records import ROLLOUT_COLUMNS, Prompt, Rollout
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.score_rollouts import reference_sequence_log_probs
from megatron_powerflow.training.session import Session

NUM_PROMPTS = 32  # of the first step's, that the base is tried on
SHOWN = 5
Inspect = Callable[[Tensor], None]  # of an update's rows, before it moves anything


def require_scores_of_base(plan: Plan, session: Session, prompts: Sequence[Prompt]) -> None:
    """Raise UserError where the base gives a prompt log-probs that are not finite. Collective.

    prompts: of the step to come. Each is scored as it stands, up to its last token once more as a response.
    """
    tried = prompts[:NUM_PROMPTS]
    rollouts = [Rollout(prompt, slot, 0, prompt.token_ids[-1:], (0.0,), "eos") for slot, prompt in enumerate(tried)]
    log_probs = reference_sequence_log_probs(rollouts, plan, session)
    bad = [prompt.id for prompt, value in zip(tried, log_probs, strict=True) if not np.isfinite(value)]
    if bad:
        raise UserError(_no_score(plan.config, bad, f"{len(bad)} of {len(tried)} prompts"))


def inspection(config: Config, prompts: Sequence[Prompt]) -> Inspect:
    """Return what looks at the rows of a start's first update. prompts: of its step, by slot."""

    def inspect(rows: Tensor) -> None:
        if violations := untrustworthy(rows.numpy(), config, [prompt.id for prompt in prompts]):
            raise UserError(violations)

    return inspect


def untrustworthy(rows: np.ndarray, config: Config, prompt_ids: Sequence[str]) -> list[str]:
    """Return why no update may be made of these rows, a sentence each; [] where it may.

    rows: [B, len(ROLLOUT_COLUMNS)], alike on every rank. prompt_ids: by slot.
    """
    columns = dict(zip(ROLLOUT_COLUMNS, rows.T, strict=True))
    violations = []
    bad = columns["rollout_index"][~np.isfinite(columns["ref_sequence_log_prob"])].astype(int)
    if len(bad):
        size = config.rollout.responses_per_prompt
        names = [f"{prompt_ids[index // size]} (response {index % size})" for index in bad]
        violations.append(_no_score(config, names, f"{len(bad)} of {len(rows)} responses"))
    bound = thresholds_of(config).sampler_gap
    same = columns["lag_max"] == 0  # the sampler had the weights that the step starts with
    num_tokens = columns["num_response_tokens"][same].sum()
    gap = float(columns["sampler_gap_sum"][same].sum() / num_tokens) if num_tokens else 0.0
    if bound is not None and gap > bound:  # NaN: log-probs of the policy that are not finite; the step is skipped
        violations.append(gap_words(config, gap, bound, engine=config.rollout.engine))
    return violations


def _no_score(config: Config, names: Sequence[str], how_many: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (
        f"model.hf_path={config.model.hf_path!r}: the base gives {how_many} log-probs that are not finite, to prompt "
        f"{', '.join(names[:SHOWN])}{more}, though its weights are: activations overflow. Try "
        f"{'precision.dtype=bf16' if config.precision.dtype == 'fp8' else 'precision.dtype=fp32'}; if they stay so, "
        "config.json does not fit these weights (rope, norms, scales), or the prompt is longer than the model was made "
        "for"
    )


def gap_words(config: Config, gap: float, bound: float, *, engine: str) -> str:
    """Say that sampler and scorer disagree, and what to do. engine: who sampled; other than megatron, a server."""
    dtype = config.precision.dtype
    by = "alarm.sampler_gap" if config.alarm.sampler_gap is not None else f"the bound of precision.dtype={dtype}"
    look = {
        "fp32": "a library or kernel may differ: see `powerflow env`",
        "bf16": "try precision.dtype=fp32, where the bound is " + f"{SAMPLER_GAP['fp32']:g}",
        "fp8": "try precision.dtype=bf16, where the bound is " + f"{SAMPLER_GAP['bf16']:g}",
    }[dtype]
    if engine != "megatron":
        look = (
            "compare the server's weights with the trainer's (a tensor that did not arrive), its dtype with "
            f"precision.dtype={dtype}, its log-probs with those at temperature {config.rollout.temperature:g}; a gap "
            "that the dtypes explain is weighed by objective.sampler_ratio"
        )
    return (
        f"sampler_gap_mean is {gap:.3g} nats per token at the first batch, above {bound:.3g} ({by}): sampler and "
        "scorer disagree on the same weights, so that the responses are not those of the policy that is trained. "
        f"Nothing was updated; {look}. If this gap is known and meant, set alarm.sampler_gap above it"
    )
