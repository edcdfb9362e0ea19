"""Answers are compared as mathematics, cheaply where that is enough."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies

from megatron_powerflow.data.answers import cluster_answers, extract_answer, same_answer


@pytest.mark.parametrize(
    ("gold", "given_answer"),
    [
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "1/2"),
        ("0.5", "\\dfrac{1}{2}"),
        ("42", "42."),
        ("42", "$42$"),
        ("C", "\\text{C}"),
        ("x^2-1", "(x-1)(x+1)"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
        ("(1,2)", "(1, 2)"),
        ("\\{1,2\\}", "\\{2,1\\}"),
    ],
)
def test_equal_answers_are_equal(gold, given_answer):
    assert same_answer(gold, given_answer)


@pytest.mark.parametrize(
    ("gold", "given_answer"),
    [
        ("42", "43"),
        ("42", None),
        ("A", "B"),
        ("1/3", "0.33"),
        ("(1,2)", "(2,1)"),
        ("x+1", "x-1"),
        ("7", "unknown"),
        ("1", "1/0"),
    ],
)
def test_different_answers_are_not(gold, given_answer):
    assert not same_answer(gold, given_answer)


@pytest.mark.parametrize(
    "hostile", ["9^{9^{9^{9}}}", "\\" * 300, "{" * 300, "__import__('os').system('true')", "\x00", "a" * 20000]
)
def test_hostile_answers_end_and_are_wrong(hostile):
    assert not same_answer("42", hostile)


def test_the_last_box_counts():
    assert extract_answer("\\boxed{1} no, \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert extract_answer("none") is None


def test_clusters_group_equal_answers_and_leave_missing_ones_alone():
    assert cluster_answers(["1/2", None, "3", "0.5", None, "\\frac{6}{2}"]) == [0, 1, 2, 0, 3, 2]
    assert cluster_answers([]) == []


@given(strategies.integers(-(10**6), 10**6), strategies.integers(1, 1000))
def test_every_way_to_write_a_fraction_is_the_same(numerator, denominator):
    assert same_answer(f"{numerator}/{denominator}", f"{3 * numerator}/{3 * denominator}")
