"""What does a server's answer to a prompt say? A group of rollouts, if it is one, and else why it is not.

Token ids go in and token ids come out. Of each response are needed: its tokens, its log-prob token by token, why it
ended, and which weights wrote which of its tokens. What an answer may not do is checked here, whoever sent it.

Left out: who is asked again (`pool.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_powerflow.random_streams import generator
from megatron_powerflow.records import FinishReason, Prompt, Rollout, SamplingParams
from megatron_powerflow.serving.server import Garbage

ROUTE = "/inference/v1/generate"
MODEL = "policy"  # what servers call the model, whatever its folder
LARGEST_SEED = 2**62


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens start, ..., end - 1 of a response were written by the weights called `version`."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt's group, as one server gave it. spans: of each response."""

    slot: int
    rollouts: tuple[Rollout, ...]
    spans: tuple[tuple[Span, ...], ...]


def request_of(slot: int, prompt: Prompt, sampling: SamplingParams, model: str) -> dict[str, Any]:
    """Return the body that asks for a prompt's group. Response i is drawn with the seed + i (`seed_of`)."""
    return {
        "model": model,
        "token_ids": list(prompt.token_ids),
        "sampling_params": {
            "n": sampling.responses_per_prompt,
            "max_tokens": sampling.max_response_tokens,
            "temperature": sampling.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed_of(slot, sampling),
            "logprobs": 0,
            "ignore_eos": True,  # the stop set is ours, and nothing of the model's folder joins it
            "stop_token_ids": sorted(sampling.stop_token_ids),
            "detokenize": False,
        },
    }


def seed_of(slot: int, sampling: SamplingParams) -> int:
    """Return the seed of a prompt's first response: a function of (run.seed, purpose, step, slot)."""
    stream = generator(sampling.purpose, seed=sampling.seed, index=sampling.step, slot=slot)
    return int(stream.integers(LARGEST_SEED))


def read_answer(
    reply: Any, slot: int, prompt: Prompt, sampling: SamplingParams, *, vocab_size: int, where: str
) -> Answer:
    """Return the group that a reply holds. where: named in what is raised. Raises Garbage where it is none."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != sampling.responses_per_prompt:
        found = len(choices) if isinstance(choices, list) else "no"
        raise Garbage(f"{where}: {found} responses, {sampling.responses_per_prompt} were asked for")
    if sorted(index for choice in choices if type(index := _get(choice, "index")) is int) != [*range(len(choices))]:
        raise Garbage(f"{where}: the responses are not numbered 0 to {len(choices) - 1}")
    rollouts, spans = [], []
    for choice in sorted(choices, key=lambda choice: choice["index"]):
        name = f"{where}: response {choice['index']}"
        tokens, log_probs = _tokens(choice, name, vocab_size)
        reason = _finish_reason(choice, tokens, sampling, name)
        rollouts.append(Rollout(prompt, slot, choice["index"], tokens, log_probs, reason))
        spans.append(_spans(choice, len(tokens), name))
    return Answer(slot, tuple(rollouts), tuple(spans))


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _tokens(choice: dict, name: str, vocab_size: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    tokens, content = choice.get("token_ids"), _get(choice.get("logprobs"), "content")
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise Garbage(f"{name}: no token ids")
    if foreign := [token for token in tokens if not 0 <= token < vocab_size]:
        raise Garbage(f"{name}: token {foreign[0]} is outside the vocabulary of {vocab_size}: another model")
    if not isinstance(content, list) or [_get(entry, "token_id") for entry in content] != tokens:
        raise Garbage(f"{name}: its log-probs are not those of its {len(tokens)} tokens")
    log_probs = tuple(_get(entry, "logprob") for entry in content)
    if not all(type(value) in (float, int) and math.isfinite(value) and -9000 < value <= 1e-3 for value in log_probs):
        # vLLM writes -9999 where it has no log-prob of a token
        raise Garbage(f"{name}: a log-prob that is none: {next(v for v in log_probs if not _is_log_prob(v))}")
    return tuple(tokens), tuple(min(float(value), 0.0) for value in log_probs)


def _is_log_prob(value: Any) -> bool:
    return type(value) in (float, int) and math.isfinite(value) and -9000 < value <= 1e-3


def _finish_reason(choice: dict, tokens: Sequence[int], sampling: SamplingParams, name: str) -> FinishReason:
    given, ends = choice.get("finish_reason"), tokens[-1] in sampling.stop_token_ids
    if any(token in sampling.stop_token_ids for token in tokens[:-1]):
        raise Garbage(f"{name}: goes on behind a token that ends a response")
    if given == "stop" and ends:
        return "eos"
    if given == "length" and not ends and len(tokens) == sampling.max_response_tokens:
        return "length"
    raise Garbage(
        f"{name}: finish_reason {given!r} after {len(tokens)} of at most {sampling.max_response_tokens} tokens, the "
        f"last of which {'ends' if ends else 'does not end'} a response"
    )


def _spans(choice: dict, num_tokens: int, name: str) -> tuple[Span, ...]:
    given = choice.get("weight_versions")
    spans = []
    for entry in given if isinstance(given, list) else []:
        version, start, end = (_get(entry, key) for key in ("version", "start", "end"))
        if not (isinstance(version, str) and type(start) is int and type(end) is int):
            raise Garbage(f"{name}: no version of weights in {str(entry)[:100]}")
        spans.append(Span(version, start, end))
    bounds = [0, *(span.end for span in spans)]
    if (
        [span.start for span in spans] != bounds[:-1]
        or bounds[-1] != num_tokens
        or any(span.start >= span.end for span in spans)
    ):
        raise Garbage(f"{name}: does not say which weights wrote each of its {num_tokens} tokens")
    return tuple(spans)
