"""avg@k, pass@k and maj@k against exact rational arithmetic, brute force and numbers worked by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_powerflow.metrics.counts import (
    QuestionCounts,
    majority_correctness,
    mean_over_tasks,
    pass_at_k,
    standard_error,
    summarize,
    summarize_tasks,
)

counts = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
small_counts = st.lists(st.booleans(), min_size=1, max_size=9).flatmap(
    lambda flags: st.tuples(st.just(flags), st.integers(1, len(flags)))
)
votes = st.lists(st.tuples(st.sampled_from([None, 0, 1, 2, 3]), st.booleans()), max_size=12)


def question(correct, clusters=None, task="math", tokens=None, truncated=None) -> QuestionCounts:
    n = len(clusters) if correct is None else len(correct)
    return QuestionCounts(
        task=task,
        num_response_tokens=tuple(tokens or [10] * n),
        truncated=tuple(truncated or [False] * n),
        clusters=tuple(clusters if clusters is not None else [0 if flag else None for flag in correct]),
        correct=None if correct is None else tuple(correct),
        sequence_log_probs=(-5.0,) * n,
    )


@settings(deadline=None)  # other tests may hold the processor
@given(counts)
def test_pass_at_k_is_the_closed_form_in_exact_arithmetic(nck):
    n, c, k = nck
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-11, abs=1e-12)


@settings(deadline=None)
@given(small_counts)
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response(case):
    flags, k = case
    subsets = list(itertools.combinations(flags, k))
    share = Fraction(sum(map(any, subsets)), len(subsets))
    assert pass_at_k(len(flags), sum(flags), k) == pytest.approx(float(share), abs=1e-12)


def test_pass_at_k_survives_numbers_whose_binomials_overflow():
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5, rel=1e-9)
    assert pass_at_k(100_000, 0, 100_000) == 0.0
    assert pass_at_k(100_000, 99_999, 2) == 1.0


@settings(deadline=None)
@given(votes, st.integers(1, 12))
def test_majority_is_the_mean_over_every_choice_of_a_largest_cluster_and_a_member(drawn, k):
    seen = [(cluster, flag) for cluster, flag in drawn[:k] if cluster is not None]
    sizes = {cluster: sum(c == cluster for c, _ in seen) for cluster, _ in seen}
    winners = [cluster for cluster in sizes if sizes[cluster] == max(sizes.values())]
    chances = [Fraction(flag, sizes[c] * len(winners)) for c, flag in seen if c in winners]
    expected = float(sum(chances, Fraction(0)))
    clusters, correct = [c for c, _ in drawn], [flag for _, flag in drawn]
    assert majority_correctness(clusters, correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("clusters", "correct", "k", "expected"),
    [
        ([0, 1, 1, 0, 1], [True, False, False, True, False], None, 0.0),
        ([0, 1, 1, 0, 1], [True, False, False, True, False], 4, 0.5),  # two against two
        ([0, 1, 1, 0, 1], [True, False, False, True, False], 1, 1.0),
        ([None, None, 0], [False, False, True], None, 1.0),  # who says nothing does not vote
        ([None, None], [False, False], None, 0.0),
        ([], [], None, 0.0),
    ],
)
def test_majority_by_hand(clusters, correct, k, expected):
    assert majority_correctness(clusters, correct, k) == expected


def test_standard_error_by_hand():
    assert standard_error([0.0, 1.0]) == pytest.approx(0.5)  # variance 1/2 over 2 questions
    assert standard_error([0.25, 0.5, 0.75, 1.0]) == pytest.approx(math.sqrt(5 / 48 / 4))
    assert standard_error([0.3]) is None


def test_a_summary_by_hand():
    row = summarize(
        [
            question([True, False, True, False], [0, 1, 0, None], tokens=[5, 6, 7, 8], truncated=[0, 0, 0, 1]),
            question([False, False, False, False], [0, 0, 0, 0], tokens=[1, 1, 1, 1]),
        ]
    )
    assert row["num_questions"] == 2
    assert row["num_responses"] == 8
    assert row["avg"] == 0.25
    assert row["avg_se"] == pytest.approx(0.25)
    assert row["pass_at"] == pytest.approx({"1": 0.25, "2": 0.5 * (1 - 1 / 6), "4": 0.5})
    assert row["pass_at_se"] == pytest.approx({"1": 0.25, "2": 0.5 * (1 - 1 / 6), "4": 0.5})
    assert row["maj"] == 0.5
    assert row["response_length_mean"] == 30 / 8
    assert row["truncated_fraction"] == 1 / 8
    assert row["boxed_rate"] == 7 / 8
    assert row["policy_entropy"] == pytest.approx(8 * 5.0 / 30)


def test_tasks_keep_their_order_and_questions_without_gold_are_counted_but_not_graded():
    tasks, everything = summarize_tasks(
        [question([True], task="b"), question(None, [None, 0, 0], task="a"), question([False, True, True], task="b")]
    )
    assert list(tasks) == ["b", "a"]
    assert tasks["a"]["avg"] is None
    assert tasks["a"]["pass_at"] == {}
    assert tasks["a"]["maj"] is None
    assert tasks["a"]["boxed_rate"] == pytest.approx(2 / 3)
    assert tasks["b"]["avg"] == everything["avg"] == pytest.approx((1 + 2 / 3) / 2)
    assert list(tasks["b"]["pass_at"]) == ["1"]  # one question has a single response
    assert everything["num_questions"] == 3
    assert everything["num_responses"] == 7


def test_the_mean_over_tasks_weighs_benchmarks_and_not_questions():
    """500 questions at .8 and 30 at .1: .45, where all questions together say .76."""
    rows = {
        "math": {"avg": 0.8, "avg_se": 0.03},
        "aime": {"avg": 0.1, "avg_se": 0.04},
        "poem": {"avg": None, "avg_se": None},
    }
    found = mean_over_tasks(rows)
    assert found == {"num_tasks": 2, "avg": pytest.approx(0.45), "avg_se": pytest.approx(0.05 / 2)}
    assert mean_over_tasks({"one": {"avg": 0.5, "avg_se": None}})["avg_se"] is None
    assert mean_over_tasks({"poem": rows["poem"]}) == {"num_tasks": 0, "avg": None, "avg_se": None}
