"""No update is made of a first batch whose numbers cannot be trusted; what is wrong with it is named."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_powerflow.config_file import parse_config
from megatron_powerflow.records import ROLLOUT_COLUMNS
from megatron_powerflow.training.first_batch import gap_words, untrustworthy

IDS = ["a", "b", "c"]


def config(*overrides: str):
    values = {
        "model": {"hf_path": "base"},
        "precision": {"dtype": "bf16"},
        "prompts": {"path": "p"},
        "rollout": {"responses_per_prompt": 2, "prompts_per_step": 3},
        "run": {"output_dir": "o"},
    }
    return parse_config(values, overrides)


def rows(gap: float = 0.0, **columns) -> np.ndarray:
    """Six rollouts of ten tokens. gap: nats per token."""
    values = dict.fromkeys(ROLLOUT_COLUMNS, np.zeros(6)) | {
        "rollout_index": np.arange(6.0),
        "num_response_tokens": np.full(6, 10.0),
        "sampler_gap_sum": np.full(6, 10.0 * gap),
        **columns,
    }
    return np.stack([values[name] for name in ROLLOUT_COLUMNS], axis=1)


@pytest.mark.parametrize(
    ("gap", "overrides", "bound", "advice"),
    [
        (0.2, (), "0.15 (the bound of precision.dtype=bf16)", "try precision.dtype=fp32, where the bound is 0.001"),
        (0.002, ("precision.dtype=fp32",), "0.001 (the bound of precision.dtype=fp32)", "powerflow env"),
        (0.4, ("precision.dtype=fp8",), "0.3 (the bound", "try precision.dtype=bf16, where the bound is 0.15"),
        (0.2, ("alarm.sampler_gap=0.1",), "0.1 (alarm.sampler_gap)", "set alarm.sampler_gap above it"),
    ],
)
def test_a_gap_above_the_bound_of_the_dtype_is_refused(gap, overrides, bound, advice):
    (text,) = untrustworthy(rows(gap), config(*overrides), IDS)
    assert f"sampler_gap_mean is {gap:g} nats per token at the first batch, above {bound}" in text
    assert advice in text


@pytest.mark.parametrize(
    ("gap", "overrides"),
    [
        (0.14, ()),
        (0.2, ("alarm.sampler_gap=0.3",)),
        (float("nan"), ()),  # the policy's log-probs are not finite: the step is skipped
        (5.0, ("rollout.replay=x", "evaluation.samples=null")),  # another policy sampled
    ],
)
def test_a_gap_below_it_or_without_one_passes(gap, overrides):
    assert untrustworthy(rows(gap), config(*overrides), IDS) == []


def test_the_gap_is_a_mean_over_tokens():
    lengths, gaps = np.array([1.0, 1, 1, 1, 1, 95]), np.array([1.0, 1, 1, 1, 1, 0])
    assert untrustworthy(rows(num_response_tokens=lengths, sampler_gap_sum=gaps), config(), IDS) == []


def test_prompts_whose_base_scores_are_not_finite_are_named():
    reference = np.array([-1.0, -1, -1, np.nan, -np.inf, -1])
    (text,) = untrustworthy(rows(ref_sequence_log_prob=reference), config(), IDS)
    assert "model.hf_path='base': the base gives 2 of 6 responses log-probs that are not finite" in text
    assert "to prompt b (response 1), c (response 0), though" in text
    assert "Try precision.dtype=fp32" in text


def test_both_are_said_at_once():
    assert len(untrustworthy(rows(1.0, ref_sequence_log_prob=np.full(6, np.nan)), config(), IDS)) == 2


def test_older_weights_are_no_gap():
    """Of six responses four are by other weights; the gap is that of the two others."""
    lag = np.array([0.0, 1, 2, 0, np.nan, 1])
    columns = {"lag_max": lag, "sampler_gap_sum": np.where(lag == 0, 1.0, np.nan)}  # .1 a token
    assert untrustworthy(rows(**columns), config(), IDS) == []
    (text,) = untrustworthy(rows(**columns), config("alarm.sampler_gap=0.09"), IDS)
    assert "sampler_gap_mean is 0.1 nats" in text
    nobody = {"lag_max": np.ones(6), "sampler_gap_sum": np.full(6, np.nan)}
    assert untrustworthy(rows(**nobody), config(), IDS) == []


def test_of_a_server_the_words_are_others():
    own = gap_words(config(), 0.31, 0.15, engine="megatron")
    server = gap_words(config("rollout.temperature=0.7"), 0.31, 0.15, engine="vllm")
    assert "precision.dtype=fp32" in own
    assert "server" not in own
    for words in (
        "a tensor that did not arrive",
        "precision.dtype=bf16",
        "at temperature 0.7",
        "objective.sampler_ratio",
    ):
        assert words in server
    for text in (own, server):
        assert text.endswith("If this gap is known and meant, set alarm.sampler_gap above it")
