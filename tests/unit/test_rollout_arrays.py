"""Rollouts as bytes: what comes back is what went in, to the last bit, and nothing is padded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_powerflow.data.rollout_arrays import from_bytes, to_bytes
from megatron_powerflow.records import Prompt, Rollout

TOKENS = st.integers(0, 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters())  # lone surrogates among them, which JSON files can hold
PROMPTS = st.builds(
    Prompt,
    id=TEXT,
    index=INT64,
    token_ids=st.lists(TOKENS, max_size=6).map(tuple),
    answer=st.none() | TEXT,
    task=st.none() | TEXT,
    text=TEXT,
)


@st.composite
def lists_of_rollouts(draw) -> list[Rollout]:
    """Any number of prompts, each with any number of responses of any lengths."""
    rollouts = []
    for prompt in draw(st.lists(PROMPTS, max_size=3)):
        slot = draw(INT64)
        for _ in range(draw(st.integers(0, 3))):
            response = draw(st.lists(TOKENS, max_size=6))
            log_probs = st.lists(st.floats(width=32, allow_nan=False), min_size=len(response), max_size=len(response))
            reason = draw(st.sampled_from(["eos", "length"]))
            spans = tuple(draw(st.lists(st.tuples(INT64, INT64, INT64), max_size=3)))
            rollouts.append(Rollout(prompt, slot, draw(INT64), tuple(response), tuple(draw(log_probs)), reason, spans))
    return rollouts


@given(lists_of_rollouts())
def test_what_comes_back_is_what_went_in(rollouts):
    """As text, too, in which -0.0 is not 0.0 and a number of numpy is not Python's."""
    again = from_bytes(to_bytes(rollouts))
    assert again == rollouts
    assert repr(again) == repr(rollouts)


def test_a_prompt_travels_once_and_nothing_is_padded():
    """512 prompt tokens of 4 bytes, 1 and 4,096 response tokens of 8; the rest is 32 bytes a rollout, 32 a prompt."""
    prompt = Prompt("p", 0, (7,) * 512, text="w" * 100)
    rollouts = [Rollout(prompt, 3, i, (5,) * size, (-0.5,) * size, "eos") for i, size in enumerate((1, 4096))]
    data = to_bytes(rollouts)
    text = len('[["p", null, null, ""]]') + 100
    assert data.dtype == np.uint8
    assert len(data) == 24 + 32 + 2 * 32 + 4 * 512 + 8 * 4097 + text
    first, second = from_bytes(data)
    assert first.prompt is second.prompt


def test_a_token_that_has_no_room_is_refused():
    with pytest.raises(OverflowError):
        to_bytes([Rollout(Prompt("", 0, (2**31,)), 0, 0, (1,), (0.0,), "eos")])
