"""How is a model asked to write several responses with their probabilities, and what did it answer?

This is the standard form of Verbalized Sampling (CHATS-lab/verbalized-sampling): one call asks, in the system message,
for k responses as one JSON object, `{"responses": [{"text": ..., "probability": ...}, ...]}`. The wording is ours.

The reply is hostile text. It is parsed as JSON or not at all, without repairs or a search for braces; one code fence
around the object is taken off, because chat models add it. A response that is not well formed is left out and counted,
by a reason from a fixed list.

Left out: the variants that reason first or ask several times; any use of the stated probabilities.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_powerflow.data.prompts import as_messages

MAX_CHARACTERS = 1_000_000  # of one answer; what is longer is not parsed
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)

# why an answer, or one of its responses, was left out
NOT_JSON = "no JSON object"
TOO_LONG = f"over {MAX_CHARACTERS} characters"
NO_LIST = "no list `responses`"
BAD_TEXT = "response without a text"
BAD_PROBABILITY = "probability not a number in [0, 1]"
SURPLUS = "more responses than asked for"
MISSING = "fewer responses than asked for"


@dataclass(frozen=True, slots=True)
class VerbalizedResponse:
    """Holds one response and the probability that the model states for it."""

    text: str  # not empty, without spaces around it
    probability: float  # as stated, 0 <= probability <= 1; those of one answer need not add up to anything


@dataclass(frozen=True, slots=True)
class VerbalizedReply:
    """Holds the responses in one answer of the model.

    failures: reason -> how many responses it cost; an answer that cannot be read costs all of them.
    """

    responses: tuple[VerbalizedResponse, ...]
    failures: Counter[str]


def instruction(num_responses: int, target_words: int | None) -> str:
    """Returns the system message that asks for the responses.

    target_words: the length to ask for; None asks for none.
    """
    length = f" Make each of them about {target_words} words long." if target_words is not None else ""
    return (
        f"Write {num_responses} different responses to what the user asks.{length}\n\n"
        'Answer with one JSON object that has the single key "responses": a list of '
        f"{num_responses} objects, each with two keys:\n"
        '- "text": the response itself, and nothing about it\n'
        '- "probability": a number from 0.0 to 1.0, your estimate of how probable this response is among all the '
        "responses that could be given\n\n"
        "Write the JSON object only: nothing before it, nothing after it."
    )


def verbalized_row(row: dict[str, Any], num_responses: int, target_words: int | None) -> dict[str, Any]:
    """Returns a row of a prompts file that asks for verbalized responses: `messages`, the instruction first.

    A system message that is there already keeps its place, the instruction follows it. Raises UserError for a row
    without a conversation, as one of token ids.
    """
    text, messages = instruction(num_responses, target_words), as_messages(row)
    if messages[0]["role"] == "system":
        text = f"{messages.pop(0)['content']}\n\n{text}"
    return {"messages": [{"role": "system", "content": text}, *messages]}


def parse_verbalized(answer: str, num_responses: int) -> VerbalizedReply:
    """Returns the well-formed responses of an answer, at most num_responses, in its order. Never raises."""
    items = _items(answer)
    if isinstance(items, str):
        return VerbalizedReply((), Counter({items: num_responses}))
    responses: list[VerbalizedResponse] = []
    failures: Counter[str] = Counter()
    for item in items[:num_responses]:
        parsed = _response(item)
        if isinstance(parsed, str):
            failures[parsed] += 1
        else:
            responses.append(parsed)
    failures += Counter({SURPLUS: len(items) - num_responses, MISSING: num_responses - len(items)})  # positive ones
    return VerbalizedReply(tuple(responses), failures)


def _items(answer: str) -> Sequence[Any] | str:
    """Returns the list under `responses`, or the reason why there is none."""
    if len(answer) > MAX_CHARACTERS:
        return TOO_LONG
    text = answer.strip()
    fenced = FENCE.fullmatch(text)
    try:
        reply = json.loads(fenced[1] if fenced else text, parse_constant=_refuse, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):  # JSONDecodeError and numbers of thousands of digits are ValueErrors
        return NOT_JSON
    if not isinstance(reply, dict):
        return NOT_JSON
    if reply.keys() != {"responses"} or not isinstance(reply["responses"], list):
        return NO_LIST
    return reply["responses"]


def _response(item: Any) -> VerbalizedResponse | str:
    """Returns one well-formed response, or the reason why it is none."""
    if not isinstance(item, dict) or not isinstance(item.get("text"), str) or not _writable(item["text"]):
        return BAD_TEXT
    probability = item.get("probability")
    if isinstance(probability, bool) or not isinstance(probability, int | float):
        return BAD_PROBABILITY
    if not (0 <= probability <= 1 and math.isfinite(probability)):
        return BAD_PROBABILITY
    return VerbalizedResponse(item["text"].strip(), float(probability))


def _writable(text: str) -> bool:
    """Whether a text holds something and can be written as UTF-8: JSON can spell half a character (a surrogate)."""
    return bool(text.strip()) and not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items = dict(pairs)
    if len(items) != len(pairs):
        raise ValueError("a key is there twice")
    return items
