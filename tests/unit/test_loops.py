"""Loops are found where they are, cost what the base model says, and ordinary mathematics is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_powerflow.data.tokenizer import load_tokenizer
from megatron_powerflow.metrics.loops import MIN_TURNS, find_loop, min_loop_tokens

SMOLLM2 = Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct"
LIMIT = 3072  # of the published recipes
IDENTITY = " \\\\ ".join(" & ".join("1" if i == j else "0" for j in range(6)) for i in range(6))
ORDINARY = {
    "repeating decimal": "1/3 = 0.333333",
    "long decimal": "1/3 is 0." + 50 * "3" + " and so on",
    "power of ten": "10000000",
    "a hundred zeros": "a googol is 1" + 100 * "0",
    "periodic decimal": "1/7 = 0." + 6 * "142857",
    "row of zeros": "0 & 0 & 0 & 0",
    "matrix of zeros": "\\begin{pmatrix}\n" + 6 * ("0 & 0 & 0 & 0 & 0 & 0 \\\\\n") + "\\end{pmatrix}",
    "identity matrix": IDENTITY,
    "table rule": "|---|---|---|",
    "wide table rule": "|" + 12 * "-----------|",
    "empty table": 8 * "|  |  |  |\n",
    "ruled table": "\\hline\n" + 8 * "a & b \\\\ \\hline\n",
    "sum": "3+3+3+3+3",
    "long sum": "+".join(30 * "7"),
    "product": "2 \\cdot 2 \\cdot 2 \\cdot 2",
    "list of ones": "1, 1, 1, 1",
    "first differences": ", ".join(25 * ["1"]),
    "leaders": "Chapter 1 " + 30 * ". " + "7",
    "dots": 60 * "." + " 5",
    "rule of dashes": 80 * "-",
    "underline": "Answer: " + 40 * "_",
    "blank lines": 10 * "\n",
    "dice": "HTHTHTHTHTHTHTHT",
    "binary": "10101010101010101010101010101010",
}
DEGENERATE = {
    "one word": "Let us see. " + 1500 * " hmm",
    "one digit": "x = 0." + 1500 * "3",
    "a sentence": "So the answer is 5. " + 200 * "Wait, let me check this again. ",
    "two sentences": 60 * "Let me reconsider the problem from the start. We have x + y = 10 and x - y = 4, so x = 7. ",
    "a line of TeX": 200 * "\\\\ &= 2 \\cdot 3 ",
}


@pytest.fixture(scope="module")
def tokenizer():
    if not SMOLLM2.is_dir():
        pytest.skip("models/SmolLM2-135M-Instruct is not there: python tools/fetch_example_model.py")
    return load_tokenizer(SMOLLM2)


def found_in(tokens, limit=LIMIT):
    return find_loop(np.array(tokens), np.full(len(tokens), -0.5), min_tokens=min_loop_tokens(limit))


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_mathematics_is_no_loop(name, tokenizer):
    """In the tokens of a real model at the recipes' limit of 3,072 tokens, and at 512; and letter by letter."""
    text = ORDINARY[name]
    assert found_in(tokenizer.encode_plain(text)) is None
    assert found_in(list(map(ord, text))) is None
    assert found_in(tokenizer.encode_plain(text), 512) is None


@pytest.mark.parametrize(
    "text",
    [
        "0.333333",
        "10000000",
        "0 & 0 & 0 & 0",
        "|---|---|---|",
        "3+3+3+3+3",
        "2 \\cdot 2 \\cdot 2 \\cdot 2",
        "1, 1, 1, 1",
    ],
)
def test_a_few_turns_are_no_loop_at_any_limit(text, tokenizer):
    assert found_in(tokenizer.encode_plain(text), 20) is None
    assert found_in(list(map(ord, text)), 20) is None


@pytest.mark.parametrize("name", DEGENERATE)
def test_what_a_model_says_over_and_over_is_a_loop(name, tokenizer):
    tokens = tokenizer.encode_plain(DEGENERATE[name])[:LIMIT]
    assert len(tokens) > min_loop_tokens(LIMIT)
    loop = found_in(tokens)
    assert loop.num_tokens > 0.9 * len(tokens) - 20
    assert (loop.nats, loop.entry_nats) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-9))


def test_a_loop_has_eight_turns_and_a_fifth_of_the_limit():
    assert [min_loop_tokens(limit) for limit in (20, 40, 512, 3072)] == [8, 8, 103, 615]
    for period in (1, 3, 5):
        turns = list(range(period)) * MIN_TURNS
        assert found_in([99, *turns], 8).num_tokens == len(turns)
        assert found_in([99, *turns[:-1]], 8) is None
    turns = 20 * [1, 2, 3, 4]
    assert found_in(turns, 400).num_tokens == 80
    assert found_in(turns, 401) is None


def test_the_cost_of_a_loop_by_hand():
    """5 9, then nine 4s: the first costs 5 nats, the others .1 each: a way in of 4.9 beyond the loop's own rate."""
    tokens = np.array([5, 9, *[4] * 9, 2])
    loop = find_loop(tokens, np.array([-1.0, -2.0, -5.0, *[-0.1] * 8, -3.0]), min_tokens=8)
    assert (loop.num_tokens, loop.nats, loop.entry_nats) == (9, pytest.approx(0.1), pytest.approx(4.9))


def test_the_cost_of_a_loop_of_three_tokens_by_hand():
    tokens = np.array([8, *[1, 2, 3] * 8, 7])
    loop = find_loop(tokens, np.array([-1, -2, -2, -2, *[-0.5] * 21, -1.0]), min_tokens=8)
    assert (loop.num_tokens, loop.nats, loop.entry_nats) == (24, pytest.approx(0.5), pytest.approx(4.5))


def test_a_loop_that_gets_cheaper_is_prolonged_at_its_settled_price():
    """Twelve turns cost 2, 1, .5, .25, then .1 each: what its length to the limit costs is the rate at the end."""
    costs = np.array([2, 1, 0.5, 0.25, *[0.1] * 8])
    loop = find_loop(np.full(12, 7), -costs, min_tokens=8)
    assert loop.nats == pytest.approx(0.1)
    assert loop.entry_nats == pytest.approx(1.9 + 0.9 + 0.4 + 0.15)


def test_the_longest_of_two_repetitions_counts():
    """Nine 4s at a nat each, then twelve 4s at .2."""
    tokens, costs = np.array([*[4] * 9, 5, *[4] * 12]), np.array([*[1.0] * 9, 3.0, *[0.2] * 12])
    loop = find_loop(tokens, -costs, min_tokens=8)
    assert (loop.num_tokens, loop.nats, loop.entry_nats) == (12, pytest.approx(0.2), pytest.approx(0.0, abs=1e-12))


def test_a_loop_that_gets_dearer_has_no_way_in_that_pays():
    loop = find_loop(np.full(12, 7), -np.array([*[0.1] * 6, *[0.5] * 6]), min_tokens=8)
    assert (loop.nats, loop.entry_nats) == (pytest.approx(0.5), 0.0)
