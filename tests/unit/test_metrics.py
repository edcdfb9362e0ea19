"""Metrics: each from one table of rollouts, with its denominator; files survive crashes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.reduce import ReductionSettings, reduce_rollouts
from megatron_powerflow.metrics.step_log import StepLog, read_step_log
from megatron_powerflow.metrics.throughput import throughput
from megatron_powerflow.metrics.writers import JsonlWriter, read_metrics
from megatron_powerflow.records import ROLLOUT_COLUMNS, StepMetrics
from megatron_powerflow.report.curves import draw_curves

PROMISED = (
    "loss",
    "residual_mean",
    "residual_std",
    "log_z_mean",
    "log_z_std",
    "group_log_z_mean",
    "group_log_z_std",
    "weight_mean",
    "response_length_mean",
    "response_length_max",
    "truncated_fraction",
    "eos_fraction",
    "boxed_rate",
    "policy_entropy",
    "sampler_gap_mean",
    "sampler_gap_max",
)


def table(**columns) -> np.ndarray:
    """Four rollouts of two prompts; columns by name, the others at harmless values."""
    values = {name: np.zeros(4) for name in ROLLOUT_COLUMNS} | {
        "rollout_index": np.arange(4.0),
        "num_prompt_tokens": np.full(4, 3.0),
        "num_response_tokens": np.array([2.0, 4, 6, 8]),
        "sequence_log_prob": np.array([-2.0, -2, -6, -10]),
        "old_sequence_log_prob": np.array([-2.0, -2, -6, -10]),
        "weight": np.ones(4),
        "ratio": np.ones(4),
        "kept": np.ones(4),
        "max_log_prob": np.full(4, -0.1),
    }
    values |= {name: np.asarray(value, dtype=float) for name, value in columns.items()}
    return np.stack([values[name] for name in ROLLOUT_COLUMNS], axis=1)


TARGET = ReductionSettings(responses_per_prompt=2, max_response_tokens=8)


def reduced(target: ReductionSettings = TARGET, **columns) -> dict[str, float]:
    return reduce_rollouts(table(**columns), target)


def test_by_hand():
    values = reduced(
        loss_term=[1, 1, 2, 0],
        residual=[1, -1, 2, 0],
        weight=[1, 1, 0.5, 1],
        log_z=[-1, -1, 3, 3],
        boxed=[1, 0, 0, 0],
        truncated=[0, 0, 0, 1],
        sampler_gap_sum=[0.1, 0.2, 0.3, 0.4],
        sampler_gap_max=[0.1, 0.1, 0.2, 0.1],
    )
    assert values["loss"] == pytest.approx((1 + 1 + 0.5 * 4) / 4)
    assert values["weighted_residual_mean"] == pytest.approx((1 - 1 + 1) / 4)
    assert values["response_length_mean"] == 5
    assert values["policy_entropy"] == pytest.approx(20 / 20)  # nats per token, over tokens
    assert values["sampler_gap_mean"] == pytest.approx(1.0 / 20)
    assert values["sampler_gap_max"] == 0.2
    assert (values["boxed_rate"], values["truncated_fraction"], values["eos_fraction"]) == (0.25, 0.25, 0.75)
    assert values["log_z_mean"] == 1.0  # over prompts
    assert values["group_log_z_mean"] == pytest.approx(((-1 - 0) + (3 - 1)) / 2)  # log Z' - mean residual, per prompt
    assert set(PROMISED) <= set(values)


def test_dropped_rollouts_enter_the_lengths_and_not_the_objective():
    values = reduced(loss_term=[1, 1, 1, 0], residual=[1, 1, 1, 100], kept=[1, 1, 1, 0])
    assert values["loss"] == values["residual_mean"] == 1.0
    assert values["num_rollouts_kept"] == 3
    assert values["response_length_max"] == 8


def test_clip_fraction_exists_only_where_something_clips():
    assert "clip_fraction" not in reduced(clipped=[np.nan] * 4)
    assert reduced(clipped=[0, 1, 1, 0])["clip_fraction"] == 0.5


def test_a_step_without_kept_rollouts_has_no_loss_and_no_nan():
    values = reduced(kept=[0, 0, 0, 0])
    assert "loss" not in values
    assert all(np.isfinite(list(values.values())))


def test_entropy_and_divergence_are_of_the_policy_that_sampled():
    """An update later the policy has moved: sequence_log_prob with it, its samples' log-probs not."""
    values = reduced(
        sequence_log_prob=[-1, -1, -3, -5],
        ref_sequence_log_prob=[-3, -3, -7, -11],
        rollout_sequence_log_prob=[-2, -2, -6, -9],
        sampler_gap_sum=[0, 0, 0, 1],
    )
    assert values["policy_entropy"] == pytest.approx(20 / 20)
    assert values["kl_per_token"] == pytest.approx(4 / 20)
    assert values["kl_per_response"] == pytest.approx(1.0)
    assert values["sampler_gap_sequence_mean"] == pytest.approx(1 / 4)  # staleness is not in it
    assert values["stale_nats_mean"] == pytest.approx((1 + 1 + 3 + 5) / 4)


def test_what_another_policy_sampled_has_no_sampler_gap():
    nothing = [np.nan] * 4
    columns = ("sampler_gap_sum", "sampler_gap_max", "sampler_gap_kl_sum", "token_ratio_sum")
    values = reduced(**dict.fromkeys((*columns, "lag_max"), nothing))
    assert not any(name.startswith(("sampler_gap", "token_ratio")) for name in values)
    assert "policy_entropy" in values


def test_self_reward_is_compared_within_prompts():
    """Within both prompts the less likely response is right; the prompts' own difference says the contrary."""
    target = replace(TARGET, alpha=4.0)
    values = reduced(
        target,
        num_response_tokens=[1, 1, 1, 1],
        ref_sequence_log_prob=[-1, -3, -1.5, -2.5],
        correct=[0, 1, 0, 1],
    )
    assert values["self_reward_covariance"] == pytest.approx((-2 * 1 / 2 - 1 * 1 / 2) / 2)
    pooled = reduced(target, num_response_tokens=[1] * 4, ref_sequence_log_prob=[-1, -1, -9, -9], correct=[1, 1, 0, 0])
    assert pooled["self_reward_covariance"] == 0.0  # easy prompts are likely and right: no covariance of responses
    alone = ReductionSettings(responses_per_prompt=1, max_response_tokens=8, alpha=4.0)
    assert "self_reward_covariance" not in reduced(alone, ref_sequence_log_prob=[-1, -2, -3, -4], correct=[1, 0, 1, 0])


def test_the_groups_own_estimate_explains_nothing():
    """A group's log Z' minus its mean residual, 0, is itself."""
    columns = {"residual": [1, -1, 2, -2], "log_z": [-1, -1, 3, 3]}
    assert reduced(**columns)["log_z_explained_variance"] == 1.0
    assert "log_z_explained_variance" not in reduced(replace(TARGET, learns_log_z=False), **columns)


def test_a_log_prob_above_0_is_a_broken_scorer():
    with pytest.raises(FloatingPointError, match="the scorer is broken"):
        reduced(max_log_prob=[-1, -1, 123.0, -1])


def test_the_order_of_rows_does_not_matter():
    rows = table(residual=[1, -1, 2, 0], log_z=[-1, -1, 3, 3])
    one = reduce_rollouts(rows, TARGET)
    other = reduce_rollouts(rows[::-1].copy(), TARGET)
    assert one == pytest.approx(other)


def test_throughput_by_hand():
    values = throughput({"rollout": 2.0, "reference": 1.0, "update": 2.0}, 50, 100)
    assert values["tokens_per_second"] == 20
    assert values["rollout_tokens_per_second"] == 50
    assert values["reference_tokens_per_second"] == 150
    assert values["update_tokens_per_second"] == 75
    assert values["step_seconds"] == 5


def test_a_resumed_file_drops_lines_of_the_lost_try_and_a_cut_line(tmp_path):
    writer = JsonlWriter(tmp_path, first_step=0)
    for step in range(4):
        writer.write(StepMetrics(step, {"loss": float(step)}))
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    writer = JsonlWriter(tmp_path, first_step=2)
    writer.write(StepMetrics(2, {"loss": 20.0}))
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 20.0)]


def test_samples_of_a_lost_try_are_replaced(tmp_path):
    path = tmp_path / "samples.jsonl"
    first = StepLog(path, first_step=0)
    for step, response in ((0, "a"), (5, "before the checkpoint"), (7, "lost")):
        first.append(step, [{"step": step, "response": response}])
    resumed = StepLog(path, first_step=5)
    assert [line["response"] for line in read_step_log(path)] == ["a", "before the checkpoint"]
    resumed.append(5, [{"step": 5, "response": "ü"}])
    resumed.append(7, [{"step": 7, "response": "b"}])
    assert [line["response"] for line in read_step_log(path)] == ["a", "ü", "b"]


def test_an_answer_at_the_last_step_stays_when_the_run_goes_on_behind_it(tmp_path):
    path = tmp_path / "samples.jsonl"
    StepLog(path, first_step=0).append(5, [{"step": 5, "response": "at the end"}])
    StepLog(path, first_step=5).append(9, [{"step": 9, "response": "later"}])
    assert [line["step"] for line in read_step_log(path)] == [5, 9]


def test_a_step_log_grows_by_appending(tmp_path):
    """The file is the same one, not a new one of its name, as long as nothing is cut back."""
    path = tmp_path / "samples.jsonl"
    StepLog(path, first_step=0).append(0, [{"step": 0, "response": "a"}])
    before = path.stat().st_ino
    StepLog(path, first_step=4).append(4, [{"step": 4, "response": "b"}])
    assert path.stat().st_ino == before


def test_an_answer_with_line_separators_is_read_back(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and str.splitlines() splits there."""
    response, path = "one\u2028two\x85three\x0bfour", tmp_path / "samples.jsonl"
    log = StepLog(path, first_step=0)
    log.append(0, [{"step": 0, "response": response}])
    log.append(5, [{"step": 5, "response": "b"}])
    assert [line["response"] for line in read_step_log(path)] == [response, "b"]


def test_curves_are_drawn_from_the_file_alone(tmp_path):
    lines = [{"step": i, "loss": 1 / (i + 1), "log_z_mean": -1.0, "grad_norm": 2.0} for i in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = draw_curves([tmp_path], tmp_path / "curves.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size > 20_000
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        draw_curves([tmp_path, tmp_path / "none"], out)


def test_a_folder_is_not_read_as_mathematics(tmp_path):
    runs = [tmp_path / r"a$\frac$", tmp_path / "b"]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n')
    assert draw_curves(runs, tmp_path / "curves.png").is_file()
