"""How good, how long, how varied are a model's answers? Samples a Hugging Face folder and reads them by the grammar.

    python -m examples.dual_nature.measure bases/g2 --setting g2 --temperature 1.0 --responses 64 --out g2.json

Every prompt has as many tokens as every other, so rows need no padding and transformers' own cache decodes them.

Left out: training (`pretrain.py`), the exact optimum to hold these figures against (`target.py`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from examples.dual_nature import corpus
from examples.dual_nature import vocabulary as v
from examples.dual_nature.corpus import MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS, Question
from examples.dual_nature.reading import parse_response

LONG_FILLER = 6  # `hmm` in a row that count as a loop
ROWS_AT_A_TIME = 2048


@dataclass(frozen=True)
class Sample:
    """One response. log_prob: of the model at temperature 1, whatever it was sampled at, in nats."""

    question: Question
    tokens: tuple[int, ...]
    log_prob: float


@torch.no_grad()
def draw_samples(
    model: LlamaForCausalLM, questions: Sequence[Question], *, num_responses: int, temperature: float, seed: int
) -> list[list[Sample]]:
    """num_responses samples of each question, from the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    rows = [question for question in questions for _ in range(num_responses)]
    flat: list[Sample] = []
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        flat += _decode(model, rows[start : start + ROWS_AT_A_TIME], temperature, generator)
    return [flat[start : start + num_responses] for start in range(0, len(flat), num_responses)]


def _decode(
    model: LlamaForCausalLM, rows: Sequence[Question], temperature: float, generator: torch.Generator
) -> list[Sample]:
    tokens = torch.tensor([question.token_ids for question in rows])
    written = torch.full((len(rows), MAX_RESPONSE_TOKENS), v.PAD)
    log_probs = torch.zeros(len(rows))
    alive, cache, fed = torch.arange(len(rows)), None, tokens
    for place in range(MAX_RESPONSE_TOKENS):
        out = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits[:, -1].float()
        drawn = (logits / temperature).softmax(dim=-1).multinomial(1, generator=generator)
        log_probs[alive] += logits.log_softmax(dim=-1).gather(1, drawn).squeeze(1)
        written[alive, place] = drawn.squeeze(1)
        going_on = (drawn.squeeze(1) != v.EOS).nonzero().squeeze(1)
        if len(going_on) == 0:
            break
        if len(going_on) < len(alive):
            cache.batch_select_indices(going_on)
        alive, fed = alive[going_on], drawn[going_on]
    return [
        Sample(question, tuple(_until_end(row)), log_prob)
        for question, row, log_prob in zip(rows, written.tolist(), log_probs.tolist(), strict=True)
    ]


def _until_end(row: list[int]) -> list[int]:
    return row[: row.index(v.EOS) + 1] if v.EOS in row else row


def boxed_answer(tokens: Sequence[int]) -> int | None:
    """The number in the last complete box: what `data.answers.extract_answer` reads of the decoded text."""
    found = None
    for place in range(len(tokens) - 2):
        number = tokens[place + 1] - v.FIRST_NUMBER
        if tokens[place] == v.BOX and tokens[place + 2] == v.CLOSE and 0 <= number < v.MODULUS:
            found = number
    return found


def describe(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Means over responses, or over questions where the name says majority or pass. All shares are of 1."""
    samples = [sample for group in groups for sample in group]
    parsed = [parse_response(sample.question, sample.tokens) for sample in samples]
    answers = [boxed_answer(sample.tokens) for sample in samples]
    right = [answer == sample.question.gold for answer, sample in zip(answers, samples, strict=True)]
    lengths = [len(sample.tokens) for sample in samples]
    marked = [sample.question.marked for sample in samples]
    figures = {
        "accuracy": _mean(right),
        "accuracy_marked": _mean(r for r, m in zip(right, marked, strict=True) if m),
        "misread_marked": _mean(
            a == s.question.misread.gold for a, s in zip(answers, samples, strict=True) if s.question.marked
        ),
        "mean_tokens": _mean(lengths),
        "entropy": -_mean(sample.log_prob for sample in samples),
        "entropy_per_token": -sum(sample.log_prob for sample in samples) / sum(lengths),
        "grammatical": _mean(p is not None for p in parsed),
        "direct": _mean(sample.tokens[0] == v.BOX for sample in samples),
        "checked": _mean(v.CHECK in sample.tokens for sample in samples),
        "digression": _mean(v.ASIDE in sample.tokens for sample in samples),
        "filler": _mean(v.HMM in sample.tokens for sample in samples),
        "long_filler": _mean(sample.tokens.count(v.HMM) >= LONG_FILLER for sample in samples),
        "truncated": _mean(v.EOS not in sample.tokens for sample in samples),
        "word_entropy": word_entropy(samples),
        "distinct": _mean(len({sample.tokens for sample in group}) / len(group) for group in groups),
    }
    for size in (16, 64):
        if len(groups[0]) >= size:
            votes = [majority([boxed_answer(sample.tokens) for sample in group[:size]]) for group in groups]
            golds = [group[0].question.gold for group in groups]
            figures[f"majority@{size}"] = _mean(vote == gold for vote, gold in zip(votes, golds, strict=True))
            figures[f"majority@{size}_marked"] = _mean(
                vote == gold for vote, gold, group in zip(votes, golds, groups, strict=True) if group[0].question.marked
            )
    num_right = [sum(boxed_answer(s.tokens) == s.question.gold for s in group) for group in groups]
    size = len(groups[0])
    for k in (1, 2, 4, 8, 16, 32, 64):
        if k <= size:
            figures[f"pass@{k}"] = _mean(pass_at(k, size, count) for count in num_right)
    return figures


def majority(answers: Sequence[int | None]) -> int | None:
    """The most common answer, the earlier one where two are; None without any."""
    counts = Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


def pass_at(k: int, num_samples: int, num_right: int) -> float:
    """Unbiased chance that one of k samples is right (arXiv 2107.03374)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def word_entropy(samples: Sequence[Sample]) -> float:
    """Nats of the distribution of synonyms, over all steps of all responses."""
    counts = Counter(token for s in samples for token in s.tokens if 0 <= token - v.FIRST_SYNONYM < len(v.SYNONYMS))
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


@torch.no_grad()
def stray_mass(model: LlamaForCausalLM, groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Mean and largest probability of <pad>, <bos> and `=` together, over the positions of sampled responses."""
    found: list[Tensor] = []
    for group in groups:
        prompts = [group[0].question.token_ids] * len(group)
        longest = max(len(sample.tokens) for sample in group)
        rows = torch.tensor(
            [p + list(s.tokens) + [v.PAD] * (longest - len(s.tokens)) for p, s in zip(prompts, group, strict=True)]
        )
        probs = model(input_ids=rows).logits.float().softmax(dim=-1)[..., [v.PAD, v.BOS, v.EQUALS]].sum(dim=-1)
        found += [
            probs[row, MAX_PROMPT_TOKENS - 1 : MAX_PROMPT_TOKENS - 1 + len(sample.tokens)]
            for row, sample in enumerate(group)
        ]
    everything = torch.cat(found)
    return {"stray_mean": float(everything.mean()), "stray_max": float(everything.max())}


def _mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values) if values else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=200, help="held-out questions, at most 1000")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    questions = corpus.split_questions(0)[1][: arguments.prompts]
    groups = draw_samples(
        model,
        questions,
        num_responses=arguments.responses,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    figures = describe(groups) | stray_mass(model, groups[:20])
    text = json.dumps({name: round(value, 5) for name, value in figures.items()}, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
