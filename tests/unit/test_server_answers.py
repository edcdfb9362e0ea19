"""What a server's answer may be: a group of rollouts to the last field, or garbage that says why."""

from __future__ import annotations

import copy
import itertools
import json

import pytest

from megatron_powerflow.records import Prompt, Purpose, SamplingParams
from megatron_powerflow.serving.answers import read_answer, request_of, seed_of
from megatron_powerflow.serving.server import Garbage

PROMPT = Prompt("q", 0, (5, 6))
SAMPLING = SamplingParams(2, 3, 0.7, frozenset({1, 9}), seed=3, step=4)


def choice(index: int, tokens: list[int], reason: str) -> dict:
    return {
        "index": index,
        "token_ids": tokens,
        "finish_reason": reason,
        "logprobs": {"content": [{"token_id": token, "logprob": -0.5 - place} for place, token in enumerate(tokens)]},
        "weight_versions": [{"version": "run/4", "start": 0, "end": len(tokens)}],
    }


GOOD = {"choices": [choice(1, [7, 8, 7], "length"), choice(0, [7, 1], "stop")]}


def read(reply):
    return read_answer(reply, 2, PROMPT, SAMPLING, vocab_size=10, where="here")


def test_a_good_answer_is_a_group_in_order():
    answer = read(GOOD)
    assert [rollout.response_index for rollout in answer.rollouts] == [0, 1]
    assert answer.rollouts[0].response_token_ids == (7, 1)
    assert answer.rollouts[0].finish_reason == "eos"
    assert answer.rollouts[1].response_token_ids == (7, 8, 7)
    assert answer.rollouts[1].finish_reason == "length"
    assert answer.rollouts[0].rollout_log_probs == (-0.5, -1.5)
    assert answer.rollouts[0].slot == 2
    assert [(span.version, span.start, span.end) for span in answer.spans[1]] == [("run/4", 0, 3)]


def spoiled(change) -> dict:
    reply = copy.deepcopy(GOOD)
    change(reply["choices"])
    return reply


SPOILED = {
    "a response too few": (lambda c: c.pop(), "1 responses, 2 were asked for"),
    "numbered twice": (lambda c: c[0].update(index=0), "not numbered 0 to 1"),
    "no tokens": (lambda c: c[0].update(token_ids=[]), "no token ids"),
    "text in place of tokens": (lambda c: c[0].update(token_ids="abc"), "no token ids"),
    "another vocabulary": (lambda c: c[0].update(token_ids=[7, 8, 10]), "outside the vocabulary of 10"),
    "log-probs of other tokens": (
        lambda c: c[0]["logprobs"]["content"].reverse() or c[0].update(token_ids=[8, 7, 7]),
        "log-probs are not those",
    ),
    "a log-prob too few": (lambda c: c[0]["logprobs"]["content"].pop(), "log-probs are not those"),
    "vLLM's word for no log-prob": (lambda c: c[0]["logprobs"]["content"][1].update(logprob=-9999.0), "-9999.0"),
    "a log-prob above 0": (lambda c: c[0]["logprobs"]["content"][1].update(logprob=0.5), "0.5"),
    "not a number": (lambda c: c[0]["logprobs"]["content"][1].update(logprob=float("nan")), "nan"),
    "goes on behind an end": (
        lambda c: c[0].update(token_ids=[7, 9, 7]) or c[0]["logprobs"]["content"][1].update(token_id=9),
        "goes on behind a token that ends a response",
    ),
    "cut too early": (lambda c: c[1].update(finish_reason="length"), "finish_reason 'length' after 2 of at most 3"),
    "aborted": (lambda c: c[0].update(finish_reason="abort"), "finish_reason 'abort'"),
    "ended by another token": (lambda c: c[0].update(finish_reason="stop"), "finish_reason 'stop'"),
    "no version": (lambda c: c[0].pop("weight_versions"), "does not say which weights"),
    "a gap between versions": (
        lambda c: c[0].update(
            weight_versions=[{"version": "a", "start": 0, "end": 1}, {"version": "b", "start": 2, "end": 3}]
        ),
        "does not say which weights",
    ),
    "a version that is no text": (
        lambda c: c[0].update(weight_versions=[{"version": 3, "start": 0, "end": 3}]),
        "no version of weights",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_answer_is_refused_by_what_is_wrong(name):
    change, why = SPOILED[name]
    with pytest.raises(Garbage, match=why.replace("(", r"\(")):
        read(spoiled(change))


@pytest.mark.parametrize(
    "reply", [None, [], "choices", {}, {"choices": None}, {"choices": [1, 2]}, {"choices": [{}, {}]}]
)
def test_an_answer_of_another_shape_is_garbage_and_no_traceback(reply):
    with pytest.raises(Garbage):
        read(reply)


def test_the_stop_set_is_ours_alone_and_nothing_is_truncated():
    body = request_of(2, PROMPT, SAMPLING, "policy")
    asked = body["sampling_params"]
    assert asked["ignore_eos"] is True
    assert asked["stop_token_ids"] == [1, 9]
    assert (asked["top_p"], asked["top_k"], asked["min_p"], asked["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
    assert asked["n"] == 2
    assert asked["max_tokens"] == 3
    assert asked["temperature"] == 0.7
    assert body["token_ids"] == [5, 6]
    assert "prompt" not in body
    json.dumps(body)


def test_seeds_differ_by_run_step_prompt_and_purpose():
    seeds = {
        seed_of(slot, SamplingParams(2, 3, 1.0, frozenset({1}), seed=seed, step=step, purpose=purpose))
        for slot in range(4)
        for seed in range(3)
        for step in range(3)
        for purpose in (Purpose.ROLLOUTS, Purpose.HELD_OUT)
    }
    assert len(seeds) == 4 * 3 * 3 * 2
    assert all(0 <= seed < 2**62 for seed in seeds)
    # responses of a prompt take the seeds behind its first one: no two prompts come near each other
    ordered = sorted(seeds)
    assert min(later - earlier for earlier, later in itertools.pairwise(ordered)) > 10_000
