"""A model small enough to enumerate: vocabulary 6 (five symbols and EOS), at most 4 tokens, 781 responses.

Those cut at 4 tokens are responses too: with them the probabilities sum to 1.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from megatron_powerflow.metrics.realised_alpha import realised_alpha
from tests.tiny_models import make_tiny_model

VOCAB, EOS, MAX_TOKENS = 6, 2, 4
PROMPT = [1, 3]
SYMBOLS = [token for token in range(VOCAB) if token != EOS]


def all_responses() -> list[list[int]]:
    ended = [[*body, EOS] for length in range(MAX_TOKENS) for body in itertools.product(SYMBOLS, repeat=length)]
    return ended + [list(body) for body in itertools.product(SYMBOLS, repeat=MAX_TOKENS)]


RESPONSES = all_responses()
LENGTHS = np.array([len(response) for response in RESPONSES])


def log_probs_of(folder: Path, temperature: float = 1.0) -> np.ndarray:
    """[781] fp64 log-probs of every response, by transformers, every token at this temperature."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    answers = np.zeros(len(RESPONSES))
    for length in range(1, MAX_TOKENS + 1):
        rows = [i for i, response in enumerate(RESPONSES) if len(response) == length]
        tokens = torch.tensor([PROMPT + RESPONSES[i] for i in rows])
        with torch.no_grad():
            scores = (network(tokens).logits[:, len(PROMPT) - 1 : -1] / temperature).log_softmax(-1)
        answers[rows] = scores.gather(2, tokens[:, len(PROMPT) :, None]).squeeze(2).sum(1).numpy()
    return answers


def realised_alpha_of(log_probs: np.ndarray, base_log_probs: np.ndarray) -> dict[str, float]:
    """What 131,072 responses of a policy, [781] log-probs each, say of its alpha."""
    share = np.exp(log_probs)
    drawn = np.random.default_rng(0).choice(len(share), size=2**17, p=share / share.sum())
    nothing = np.zeros(len(drawn))
    return realised_alpha(log_probs[drawn], base_log_probs[drawn], LENGTHS[drawn], nothing, nothing)


def make_enumerable(folder: Path, *, scale: float, seed: int) -> tuple[Path, Path]:
    """(model folder, prompts file), both in `folder`. scale: standard deviation of the model's weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = make_tiny_model(
        folder / "model", "llama", vocab_size=VOCAB, scale=scale, seed=seed, rope=None, eos_token_id=EOS, **sizes
    )
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt_token_ids": PROMPT}) + "\n")
    return model, folder / "prompts.jsonl"
