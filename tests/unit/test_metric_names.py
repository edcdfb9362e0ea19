"""Which numbers does a line of metrics.jsonl hold? All of them, by form: a metric that vanishes fails here.

Eight rollouts of two prompts, worked by hand where `test_metrics.py` does not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_powerflow.metrics.reduce import ReductionSettings, reduce_rollouts
from megatron_powerflow.records import ROLLOUT_COLUMNS

NAN = np.full(8, np.nan)
COLUMNS = {
    "rollout_index": np.arange(8),
    "num_prompt_tokens": [3, 3, 3, 3, 5, 5, 5, 5],
    "num_response_tokens": [2, 4, 6, 8, 10, 20, 20, 10],
    "sequence_log_prob": [-2, -5, -4, -9, -11, -20, -24, -8],
    "old_sequence_log_prob": [-2, -4, -5, -9, -10, -21, -24, -8],
    "ref_sequence_log_prob": [-4, -6, -5, -10, -13, -24, -23, -14],
    "rollout_sequence_log_prob": [-2.1, -4, -5.2, -9, -10, -20.5, -24, -8],
    "loss_term": [1, 2, 3, 4, 5, 6, 7, 0],
    "log_z": [-1, -1, -1, -1, -2, -2, -2, -2],
    "psi": [0, -0.5, 0, 0, 0, 0, 0, -0.5],
    "reward": [1, 0, 0, 0, 1, 1, 0, 0],
    "residual": [0.5, -0.5, 1, 0, -1, 0, 2, 8],
    "advantage": NAN,
    "weight": [1, 1.2, 0.8, 1, 1, 1, 1, 9],
    "sampler_weight": NAN,
    "sampler_truncated": NAN,
    "importance": NAN,
    "ratio": [1, 1.5, 0.5, 1, 1, 1, 1, 9],
    "clipped": [0, 1, 1, 0, 0, 0, 0, 1],
    "kept": [1, 1, 1, 1, 1, 1, 1, 0],
    "truncated": [0, 0, 0, 0, 0, 1, 1, 0],
    "sampler_gap_sum": [0.1, 0, 0.2, 0, 0, 0.5, 0, 0],
    "sampler_gap_max": [0.1, 0, 0.2, 0, 0, 0.3, 0, 0],
    "sampler_gap_kl_sum": [0.01, 0, 0.02, 0, 0, 0.05, 0, 0],
    "token_ratio_sum": [2.1, 4, 6.2, 8, 10, 19.6, 20, 10],
    "staleness_sum": NAN,
    "staleness_max": NAN,
    "staleness_kl_sum": NAN,
    "lag_sum": [0] * 8,
    "lag_max": [0] * 8,
    "num_versions": [1] * 8,
    "max_log_prob": [-0.1] * 8,
    "loop_tokens": [np.nan, np.nan, np.nan, np.nan, np.nan, 16, 8, np.nan],
    "loop_nats": [np.nan, np.nan, np.nan, np.nan, np.nan, 0.1, 0.2, np.nan],
    "entry_nats": [np.nan, np.nan, np.nan, np.nan, np.nan, 3, 4, np.nan],
    "boxed": [1, 0, 1, 1, 1, 1, 1, 0],
    "correct": [1, 0, 0, 0, np.nan, np.nan, np.nan, np.nan],
    "repeated_share": [0, 0, 0, 0, 0, 0.8, 0.4, 0],
    "distinct_2": [0.9] * 4 + [0.5] * 4,
    "distinct_3": [1.0] * 4 + [0.6] * 4,
}
LEARNED = ReductionSettings(4, 20, alpha=2.0, has_tilt=True, energy_per_token=True)


def table(**columns) -> np.ndarray:
    assert set(COLUMNS) == set(ROLLOUT_COLUMNS)
    return np.stack([np.asarray((COLUMNS | columns)[name], dtype=float) for name in ROLLOUT_COLUMNS], axis=1)


BALANCE = reduce_rollouts(table(), LEARNED)

# of the responses, whatever the form
OF_RESPONSES = {
    *("num_rollouts", "num_rollouts_kept", "num_prompts", "num_prompt_tokens", "num_response_tokens"),
    *("response_length_mean", "response_length_max", "response_length_p95", "truncated_fraction", "eos_fraction"),
    *("truncated_fraction_error", "response_log_length_mean", "response_log_length_error"),
    *("boxed_rate", "accuracy", "repeated_share", "loop_fraction", "distinct_2", "distinct_3"),
    *("policy_entropy", "ref_log_prob_mean", "kl_per_token", "kl_per_response"),
    *("sampler_gap_mean", "sampler_gap_max", "sampler_gap_kl", "token_ratio_mean"),
    *("sampler_gap_sequence_mean", "sampler_gap_sequence_max"),
    *("stale_nats_mean", "sequence_ratio_mean", "effective_sample_share"),
    *("alpha_realised", "alpha_realised_low", "alpha_realised_high", "alpha_realised_r2", "lambda_realised"),
}
# of what is minimised, whatever it is
OF_LOSSES = {"loss", "weight_mean", "ratio_mean", "psi_mean", "reward_mean"}
OF_BALANCES = {
    *("residual_mean", "residual_std", "weighted_residual_mean"),
    *("residual_p05", "residual_p25", "residual_p50", "residual_p75", "residual_p95"),
    *("residual_length_q1", "residual_length_q2", "residual_length_q3", "residual_length_q4"),
    *("log_z_mean", "log_z_std", "group_log_z_mean", "group_log_z_std"),
}
OF_HEADS = {"log_z_explained_variance"}
OF_POWERS = {"alpha", "inversion_rate", "self_reward_covariance"}
OF_TILTS = {
    *("trap_effective_samples", "trap_lambda", "trap_lambda_mean", "trap_lambda_std", "trap_log_z_gap"),
    *("trap_loop_nats", "trap_entry_nats", "trap_margin"),
}
# rollouts of the target itself, or nothing could be said of lambda
ON_TARGET = {
    "old_sequence_log_prob": 2.0 * np.array(COLUMNS["ref_sequence_log_prob"]),
    "psi": np.zeros(8),
    "reward": np.zeros(8),
}
RIVAL = {"residual": NAN, "log_z": NAN, "advantage": [1, 0, 0, -1, 2, 0, -2, 0]}


@pytest.mark.parametrize(
    ("target", "columns", "names"),
    [
        (LEARNED, {}, OF_BALANCES | OF_HEADS | OF_POWERS | OF_TILTS | {"clip_fraction"}),
        (LEARNED, {"clipped": NAN}, OF_BALANCES | OF_HEADS | OF_POWERS | OF_TILTS),
        (replace(LEARNED, learns_log_z=False), {"clipped": NAN}, OF_BALANCES | OF_POWERS | OF_TILTS),
        (ReductionSettings(4, 20, alpha=2.0, learns_log_z=False), {"clipped": NAN}, OF_BALANCES | OF_POWERS),  # tb_traj
        (ReductionSettings(4, 20, learns_log_z=False), RIVAL, {"advantage_std", "clip_fraction"}),  # grpo
        (
            replace(LEARNED, learns_log_z=False),
            RIVAL | {"clipped": NAN},
            {"advantage_std"} | OF_POWERS | OF_TILTS - {"trap_log_z_gap"},
        ),
        (
            ReductionSettings(4, 20, learns_log_z=False),
            RIVAL | {"clipped": NAN, "advantage": NAN},
            set(),
        ),  # one_shot_em
    ],
    ids=["learned", "learned on policy", "group", "tb_traj", "grpo", "rl_token", "one_shot_em"],
)
def test_every_metric_of_a_form_is_there_and_no_other(target, columns, names):
    assert set(reduce_rollouts(table(**ON_TARGET | columns), target)) == OF_RESPONSES | OF_LOSSES | names


def test_a_step_without_kept_rollouts_has_those_of_its_responses():
    of_kept = {name for name in OF_RESPONSES if "realised" in name}
    lines = reduce_rollouts(table(kept=np.zeros(8)), replace(LEARNED, has_tilt=False))
    assert set(lines) == OF_RESPONSES - of_kept


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_rollouts", 8),
        ("num_rollouts_kept", 7),
        ("num_prompts", 2),
        ("num_prompt_tokens", 32),
        ("num_response_tokens", 80),
        ("response_length_mean", 10),
        ("response_length_max", 20),
        ("response_length_p95", 20),
        ("truncated_fraction", 2 / 8),
        ("eos_fraction", 6 / 8),
        ("truncated_fraction_error", np.std([0, 0.5], ddof=1) / 2**0.5),
        ("response_log_length_mean", np.log([2, 4, 6, 8, 10, 20, 20, 10]).mean()),
        (
            "response_log_length_error",
            abs(np.log([2, 4, 6, 8]).mean() - np.log([10, 20, 20, 10]).mean()) / 2,  # of two: half of the distance
        ),
        ("boxed_rate", 6 / 8),
        ("accuracy", 1 / 4),  # of the four that have an answer
        ("repeated_share", 1.2 / 8),
        ("loop_fraction", 2 / 8),  # 16 and 8 tokens, of a limit of 20: 8 are enough
        ("distinct_2", 0.7),
        ("distinct_3", 0.8),
        ("policy_entropy", 83 / 80),
        ("ref_log_prob_mean", -99 / 80),
        ("kl_per_token", 16 / 80),
        ("kl_per_response", 16 / 8),
        ("sampler_gap_mean", 0.8 / 80),
        ("sampler_gap_max", 0.3),
        ("sampler_gap_sequence_mean", (0.1 + 0.2 + 0.5) / 8),
        ("sampler_gap_sequence_max", 0.5),
        ("sampler_gap_kl", 0.08 / 80),
        ("token_ratio_mean", 79.9 / 80),
        ("stale_nats_mean", 4 / 8),
        ("loss", 28 / 7),
        ("weight_mean", 7 / 7),
        ("ratio_mean", 7 / 7),
        ("clip_fraction", 2 / 7),
        ("psi_mean", -0.5 / 7),
        ("reward_mean", 3 / 7),
        ("residual_mean", 2 / 7),
        ("residual_std", (6.5 / 7 - (2 / 7) ** 2) ** 0.5),
        ("residual_p50", 0),
        ("weighted_residual_mean", (0.5 - 0.6 + 0.8 - 1 + 2) / 7),
        ("residual_length_q1", 0),  # of 2 and 4 tokens
        ("residual_length_q4", 2),  # the last of 20
        ("log_z_mean", -1.5),
        ("log_z_std", 0.5),
        ("group_log_z_mean", (-1 - 0.25 + -2 - 1 / 3) / 2),
        ("group_log_z_std", abs(-1.25 - -7 / 3) / 2),
        ("alpha", 2),
        ("inversion_rate", 2 / (6 + 3)),  # -4 > -5 and -6 < -5; -21 > -24 and -24 < -23
        ("self_reward_covariance", (-2 - np.mean([-2, -1.5, -5 / 6, -1.25])) / 3),
        ("trap_loop_nats", 0.15),
        ("trap_entry_nats", 3.5),
    ],
)
def test_values_by_hand(name, value):
    assert BALANCE[name] == pytest.approx(value)


OF_GAPS = {name for name in OF_RESPONSES if name.startswith("sampler_gap")} | {"token_ratio_mean"}
OF_STALENESS = {f"staleness_{name}" for name in ("mean", "max", "kl", "sequence_mean", "sequence_max")}
OF_GAP_COLUMNS = ("sampler_gap_sum", "sampler_gap_max", "sampler_gap_kl_sum", "token_ratio_sum")
# the second prompt's responses by older weights: of 10, 20, 20, 10 tokens; S_old - S_sampler = 0 -.5 0 0
LAGGED = {
    **{name: np.where(np.arange(8) < 4, COLUMNS[name], np.nan) for name in OF_GAP_COLUMNS},
    "staleness_sum": [np.nan] * 4 + [0, 0.9, 0, 0.3],
    "staleness_max": [np.nan] * 4 + [0, 0.4, 0, 0.2],
    "staleness_kl_sum": [np.nan] * 4 + [0, 0.12, 0, 0.06],
    "lag_sum": [0, 0, 0, 0, 10, 30, 40, 10],
    "lag_max": [0, 0, 0, 0, 1, 2, 2, 1],
    "num_versions": [1, 1, 1, 1, 1, 2, 1, 1],
}


def test_the_numbers_of_older_weights_by_hand():
    found = reduce_rollouts(table(**LAGGED), replace(LEARNED, has_lag=True))
    expected = {
        "sampler_gap_mean": 0.3 / 20,  # over the 20 tokens of the first prompt
        "sampler_gap_max": 0.2,
        "sampler_gap_kl": 0.03 / 20,
        "sampler_gap_sequence_mean": 0.3 / 4,
        "sampler_gap_sequence_max": 0.2,
        "token_ratio_mean": 20.3 / 20,
        "staleness_mean": 1.2 / 60,
        "staleness_max": 0.4,
        "staleness_kl": 0.18 / 60,
        "staleness_sequence_mean": 0.5 / 4,
        "staleness_sequence_max": 0.5,
        "lag_mean": 90 / 80,
        "lag_max": 2,
        "mixed_versions": 1 / 8,
        "policy_entropy": (20 + 62.5) / 80,  # of what sampled: the trainer's of the first four, the sampler's of others
        "kl_per_token": (25 - 20 + 74 - 62.5) / 80,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name
    assert found["stale_nats_mean"] == BALANCE["stale_nats_mean"]


def test_a_step_by_older_weights_alone_has_no_gap_and_one_by_its_own_no_staleness():
    everything = OF_GAPS | OF_STALENESS | {"lag_mean", "lag_max", "mixed_versions"}
    nothing = dict.fromkeys(OF_GAP_COLUMNS, NAN)
    older = {"staleness_sum": [0.1] * 8, "staleness_max": [0.1] * 8, "staleness_kl_sum": [0.1] * 8, "lag_max": [1] * 8}
    lagging = replace(LEARNED, has_lag=True)
    assert everything & reduce_rollouts(table(**nothing, **older), lagging).keys() == everything - OF_GAPS
    assert everything & BALANCE.keys() == OF_GAPS
    another = dict.fromkeys(("lag_sum", "lag_max", "num_versions"), NAN)  # another run's, scored by the trainer
    assert everything & reduce_rollouts(table(**nothing, **older | another), LEARNED).keys() == OF_STALENESS
    saved = reduce_rollouts(table(**nothing, **another), LEARNED)  # and not scored
    assert not everything & saved.keys()
    assert saved["policy_entropy"] == pytest.approx(-sum(COLUMNS["rollout_sequence_log_prob"]) / 80)


def test_the_share_of_samples_that_weights_leave_by_hand():
    """Over the seven that are kept: v = 1 2 1 2 1 1 1, (9)^2 / (7 13); w v = .5 and six 1, (6.5)^2 / (7 6.25)."""
    columns = {
        "sampler_weight": [1, 2, 1, 2, 1, 1, 1, 50],
        "sampler_truncated": [0, 1, 0, 1, 0, 0, 0.5, 1],
        "importance": [0.5, 1, 1, 1, 1, 1, 1, 50],
    }
    found = reduce_rollouts(table(**columns), LEARNED)
    assert found["sampler_weight_mean"] == pytest.approx(9 / 7)
    assert found["sampler_weight_effective_share"] == pytest.approx(81 / (7 * 13))
    assert found["sampler_truncated_fraction"] == pytest.approx(2.5 / 7)
    assert found["importance_effective_share"] == pytest.approx(6.5**2 / (7 * 6.25))
    names = {"sampler_weight_mean", "sampler_weight_effective_share", "sampler_truncated_fraction"}
    assert set(found) - set(BALANCE) == names | {"importance_effective_share"}
    assert "importance_effective_share" not in reduce_rollouts(table(importance=[0] * 8), LEARNED)


def test_the_ratio_to_the_sampler_by_hand():
    """S - S_sampler = .1 -1 1.2 0 -1 .5 0 0: how far training has moved is in it."""
    ratios = np.exp([0.1, -1, 1.2, 0, -1, 0.5, 0, 0])
    assert BALANCE["sequence_ratio_mean"] == pytest.approx(ratios.mean())
    assert BALANCE["effective_sample_share"] == pytest.approx(ratios.sum() ** 2 / (8 * (ratios**2).sum()))


def test_explained_variance_by_hand():
    """The group's estimates are -1.25 and -7/3, the head's -1 and -2: 1 - (1/24)^2 / (13/24)^2."""
    assert BALANCE["log_z_explained_variance"] == pytest.approx(1 - (1 / 13) ** 2)


def test_the_spread_of_advantages_is_over_all_kept_rollouts():
    columns = {**RIVAL, "advantage": [1, -1, 1, -1, 1, -1, 0, 50]}
    found = reduce_rollouts(table(**columns), ReductionSettings(4, 20, learns_log_z=False))
    assert found["advantage_std"] == pytest.approx((6 / 7) ** 0.5)


def test_quarters_go_from_short_to_long():
    """Eight kept, lengths out of order: pairs of 1 2 | 3 4 | 5 6 | 7 8 tokens."""
    columns = {
        "num_response_tokens": [8, 1, 7, 2, 6, 3, 5, 4],
        "residual": [8, 1, 7, 2, 6, 3, 5, 4],
        "kept": np.ones(8),
    }
    found = reduce_rollouts(table(**columns), LEARNED)
    assert [found[f"residual_length_q{number}"] for number in range(1, 5)] == [1.5, 3.5, 5.5, 7.5]


def test_pairs_that_are_tied_are_no_pairs():
    """S = 0 -1 -2 -2 against S_ref = -1 0 -2 -3: one of five is inverted; the other prompt is tied."""
    columns = {
        "old_sequence_log_prob": [0, -1, -2, -2, *[-5] * 4],
        "ref_sequence_log_prob": [-1, 0, -2, -3, -1, -2, -3, -4],
    }
    assert reduce_rollouts(table(**columns), LEARNED)["inversion_rate"] == pytest.approx(1 / 5)


def test_a_log_prob_just_above_0_is_rounding_and_a_little_more_is_not():
    reduce_rollouts(table(max_log_prob=[-1] * 7 + [5e-4]), LEARNED)
    with pytest.raises(FloatingPointError, match="the scorer is broken"):
        reduce_rollouts(table(max_log_prob=[-1] * 7 + [0.01]), LEARNED)
