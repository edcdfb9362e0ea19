"""How do rollouts become one flat array of bytes, and rollouts again? Unpadded, and a prompt once for its responses.

    head       [3] int64                 number of prompts p, of rollouts r, of bytes of text
    prompts    [p, 4] int64              slot, index, number of tokens, number of rollouts that follow each other
    responses  [r, 4] int64              response_index, number of tokens, 1 where it is cut at the limit, spans
    spans      [sum of spans, 3] int64   weight_versions of all responses
    tokens     [sum of both] int32       of all prompts, then of all responses
    log-probs  [sum of responses] fp32
    text       JSON in ASCII             id, answer, task and text of each prompt

What comes back is equal to what went in: log-probs are fp32 wherever they come from (`rollout/sampling.py`).

Left out: who sends them to whom (`training/rollout_exchange.py`), the files of a run (`rollout/rollout_files.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain, groupby

import numpy as np

from megatron_powerflow.records import Prompt, Rollout


def to_bytes(rollouts: Sequence[Rollout]) -> np.ndarray:
    """Returns the rollouts, in their order, as [n] uint8.

    A log-prob that is no fp32 number is rounded to one, as micro-batches round it. Raises OverflowError for a token
    that is no int32.
    """
    assert all(len(rollout.rollout_log_probs) == len(rollout.response_token_ids) for rollout in rollouts)
    runs = [(key, len(list(run))) for key, run in groupby(rollouts, key=lambda rollout: (rollout.slot, rollout.prompt))]
    prompts = [(slot, prompt.index, len(prompt.token_ids), size) for (slot, prompt), size in runs]
    responses = [
        (r.response_index, len(r.response_token_ids), r.finish_reason == "length", len(r.weight_versions))
        for r in rollouts
    ]
    texts = [(prompt.id, prompt.answer, prompt.task, prompt.text) for (_, prompt), _ in runs]
    text = np.frombuffer(json.dumps(texts).encode("ascii"), np.uint8)
    parts = [
        np.array([len(runs), len(rollouts), len(text)], np.int64),
        np.array(prompts, np.int64),
        np.array(responses, np.int64),
        np.array([span for rollout in rollouts for span in rollout.weight_versions], np.int64),
        _flat((prompt.token_ids for (_, prompt), _ in runs), np.int32),
        _flat((rollout.response_token_ids for rollout in rollouts), np.int32),
        _flat((rollout.rollout_log_probs for rollout in rollouts), np.float32),
        text,
    ]
    return np.concatenate([part.ravel().view(np.uint8) for part in parts])


def from_bytes(data: np.ndarray) -> list[Rollout]:
    """Returns the rollouts that `to_bytes` made `data` of, in their order. Rollouts of a run share their prompt."""
    (num_prompts, num_rollouts, num_text), data = _taken(data, 3, np.int64)
    prompt_numbers, data = _taken(data, 4 * num_prompts, np.int64)
    response_numbers, data = _taken(data, 4 * num_rollouts, np.int64)
    prompt_numbers, response_numbers = prompt_numbers.reshape(-1, 4), response_numbers.reshape(-1, 4)
    spans, data = _taken(data, 3 * response_numbers[:, 3].sum(), np.int64)
    prompt_tokens, data = _taken(data, prompt_numbers[:, 2].sum(), np.int32)
    num_tokens = response_numbers[:, 1].sum()
    tokens, data = _taken(data, num_tokens, np.int32)
    log_probs, text = _taken(data, num_tokens, np.float32)
    assert len(text) == num_text
    prompts = [
        Prompt(id_, index, token_ids, answer, task, text_)
        for (id_, answer, task, text_), index, token_ids in zip(
            json.loads(text.tobytes()),
            prompt_numbers[:, 1].tolist(),
            _split(prompt_tokens, prompt_numbers[:, 2]),
            strict=True,
        )
    ]
    runs = zip(prompt_numbers[:, 0].tolist(), prompts, prompt_numbers[:, 3].tolist(), strict=True)
    return [
        Rollout(prompt, slot, response_index, response, its_log_probs, "length" if is_cut else "eos", versions)
        for (slot, prompt), (response_index, _, is_cut, _), response, its_log_probs, versions in zip(
            ((slot, prompt) for slot, prompt, size in runs for _ in range(size)),
            response_numbers.tolist(),
            _split(tokens, response_numbers[:, 1]),
            _split(log_probs, response_numbers[:, 1]),
            _split_spans(spans, response_numbers[:, 3]),
            strict=True,
        )
    ]


def _flat(rows: Iterable[Sequence[float]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype)


def _taken(data: np.ndarray, count: int, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first `count` numbers of `dtype`, and the bytes behind them."""
    end = int(count) * np.dtype(dtype).itemsize
    return data[:end].view(dtype), data[end:]


def _split(values: np.ndarray, sizes: np.ndarray) -> list[tuple]:
    """Returns the values in pieces of these sizes, as Python's own numbers."""
    numbers, ends = values.tolist(), np.cumsum(sizes).tolist()
    return [tuple(numbers[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]


def _split_spans(values: np.ndarray, sizes: np.ndarray) -> list[tuple[tuple[int, int, int], ...]]:
    """Returns the spans, three numbers each, in pieces of so many spans."""
    numbers, ends = [tuple(span) for span in values.reshape(-1, 3).tolist()], np.cumsum(sizes).tolist()
    return [tuple(numbers[end - size : end]) for end, size in zip(ends, sizes.tolist(), strict=True)]
