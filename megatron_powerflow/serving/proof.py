"""Does a server compute with the weights that it was sent? Three answers, and which tensors are suspect where not.

    received     the checksum of every tensor as it was loaded, against the trainer's
    computed     what each layer makes of a vector, against the tensor that it was given; the server itself compares
    log-probs    of fixed texts, against the trainer's

The first finds what was lost on the way, the second what a layer keeps of older weights (a tied output layer whose
packed copy stays), the third anything else. vLLM's own /weight_checker digests a layer's parameters; on CPU those of
packed layers are empty, so it cannot tell.

Left out: sending (`weight_sync.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.serving.answers import MODEL, ROUTE
from megatron_powerflow.serving.manifest import Manifest
from megatron_powerflow.serving.server import Garbage, Refused, Server

SHOWN = 6
PROBE_SECONDS = 600.0


class NotProved(UserError):
    """A server has other weights than the trainer: its responses are not the policy's."""


@dataclass(frozen=True, slots=True)
class Proof:
    """How near a server is to the trainer. Gaps in nats per token, over the texts of the probe. num_untried: tensors
    whose layer the server could not ask."""

    gap_mean: float
    gap_max: float
    num_equal: int
    num_untried: int


def prove(server: Server, manifest: Manifest, *, seconds: float) -> Proof:
    """Compare a server with the trainer. Raises NotProved where they differ, ServerError where it does not answer."""
    version = server.weight_version().rstrip("?")  # weight_sync.UNPROVED
    wrong = [] if version == manifest.version else [f"it says that it has version {version!r}"]
    try:
        received = [part for part in server.call("weights_received", seconds=seconds) if isinstance(part, dict)]
        unlike = [part for part in server.call("weights_unlike", seconds=seconds) if isinstance(part, dict)]
    except Refused as error:
        raise Refused(
            f"{error}: it cannot say which weights it has; start it with the command of `powerflow vllm-args`"
        ) from None
    if not received or not unlike:
        raise Garbage(f"{server.url}: does not say which weights it received")
    wrong += _differing(received, manifest.checksums)
    named = sorted({str(name) for part in unlike for name in part.get("unlike", ())})
    if named:
        wrong.append(f"layers that compute with something else than they were sent: {_some(named)}")
    gaps = _gaps(server, manifest)
    mean, largest = sum(gaps) / len(gaps), max(gaps)
    if not mean <= manifest.probe.bound:
        wrong.append(
            f"its log-probs of {len(manifest.probe.token_ids)} fixed texts are {mean:.3g} nats per token from the "
            f"trainer's (at most {largest:.3g}); {manifest.probe.bound:g} is allowed (alarm.sampler_gap)"
            + (
                ""
                if wrong
                else "; every tensor was received as it was sent, and every layer that could be asked "
                "computes with it: look at its dtype, its rope and norms, and --logprobs-mode"
            )
        )
    if wrong:
        raise NotProved(
            f"vLLM server {server.url} does not have the weights of step {manifest.step} (version "
            f"{manifest.version}): {'; '.join(wrong)}. Its responses would not be the policy's; nothing was trained on "
            "them"
        )
    untried = {str(name) for part in unlike for name in part.get("untried", ())}
    return Proof(mean, largest, len(manifest.checksums), len(untried))


def _differing(received: list[dict[str, Any]], wanted: dict[str, str]) -> list[str]:
    """What the workers of a server were given otherwise than it was sent, a sentence each. Every worker sees all."""
    missing = sorted(name for name in wanted if any(name not in part for part in received))
    other = sorted(name for name in wanted if any(part.get(name, wanted[name]) != wanted[name] for part in received))
    sentences = [f"never loaded: {_some(missing)}"] if missing else []
    shapes = [name for name in other if any(_shape(part.get(name)) != _shape(wanted[name]) for part in received)]
    if shapes:
        name = shapes[0]
        theirs = next(_shape(part.get(name)) for part in received if _shape(part.get(name)) != _shape(wanted[name]))
        sentences.append(f"of another shape: {_some(shapes)} ({theirs}, {_shape(wanted[name])} was sent)")
    rest = [name for name in other if name not in shapes]
    return sentences + ([f"with other numbers than were sent: {_some(rest)}"] if rest else [])


def _shape(text: Any) -> str:
    return text.split(":")[1] if isinstance(text, str) and text.count(":") == 2 else "unknown"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _gaps(server: Server, manifest: Manifest) -> list[float]:
    """|server - trainer| of every token of the probe's texts, nats; infinity where the server has no number."""
    gaps: list[float] = []
    for tokens, wanted in zip(manifest.probe.token_ids, manifest.probe.log_probs, strict=True):
        body = {
            "model": MODEL,
            "token_ids": list(tokens),
            "sampling_params": {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False},
        }
        reply = server.post(ROUTE, body, seconds=PROBE_SECONDS)
        given = reply.get("prompt_logprobs") if isinstance(reply, dict) else None
        if not isinstance(given, list) or len(given) != len(tokens):
            raise Garbage(f"{server.url}: no log-probs of the {len(tokens)} tokens of a text")
        for token, entry, expected in zip(tokens[1:], given[1:], wanted, strict=True):
            one = entry.get(str(token)) if isinstance(entry, dict) else None
            value = one.get("logprob") if isinstance(one, dict) else None
            number = float(value) if isinstance(value, int | float) else math.nan
            gaps.append(abs(number - expected) if math.isfinite(number) else math.inf)
    return gaps
