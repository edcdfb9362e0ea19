"""`powerflow train` reaches the exact optimum pi* ~ p_base^alpha * exp(-lambda |y|) of an enumerable model.

Vocabulary 6 (five symbols and EOS), at most 4 tokens: 781 responses, those cut at 4 tokens included (they keep their
mass: objective.truncated=keep). lambda is found by bisection; the trained policy is read from the exported folder.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import run_cli
from tests.tiny_models import make_tiny_model

VOCAB, EOS, MAX_TOKENS = 6, 2, 4
PROMPT = [1, 3]
SYMBOLS = [token for token in range(VOCAB) if token != EOS]


def all_responses() -> list[list[int]]:
    ended = [[*body, EOS] for length in range(MAX_TOKENS) for body in itertools.product(SYMBOLS, repeat=length)]
    return ended + [list(body) for body in itertools.product(SYMBOLS, repeat=MAX_TOKENS)]


RESPONSES = all_responses()
LENGTHS = np.array([len(response) for response in RESPONSES])


def log_probs_of(folder: Path) -> np.ndarray:
    """[781] fp64 log-probs of every response, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    answers = np.zeros(len(RESPONSES))
    for length in range(1, MAX_TOKENS + 1):
        rows = [i for i, response in enumerate(RESPONSES) if len(response) == length]
        tokens = torch.tensor([PROMPT + RESPONSES[i] for i in rows])
        with torch.no_grad():
            scores = network(tokens).logits[:, len(PROMPT) - 1 : -1].log_softmax(-1)
        answers[rows] = scores.gather(2, tokens[:, len(PROMPT) :, None]).squeeze(2).sum(1).numpy()
    return answers


def optimum(base: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """pi* and lambda: the root of sum p_base^alpha exp(-lambda n) = 1."""
    low, high = -50.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.exp(alpha * base - middle * LENGTHS).sum() > 1 else (low, middle)
    return np.exp(alpha * base - middle * LENGTHS), middle


@pytest.fixture(scope="module")
def enumerable(tmp_path_factory) -> tuple[Path, Path]:
    """(model folder, prompts file)."""
    folder = tmp_path_factory.mktemp("enumerable")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = make_tiny_model(
        folder / "model", "llama", vocab_size=VOCAB, scale=0.05, seed=6, rope=None, eos_token_id=EOS, **sizes
    )
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt_token_ids": PROMPT}) + "\n")
    (folder / "config.yaml").write_text(
        f"model: {{hf_path: {model}}}\nprompts: {{path: {folder / 'prompts.jsonl'}}}\n"
        f"run: {{output_dir: {folder / 'run'}}}\n"
    )
    return model, folder / "config.yaml"


def test_the_enumeration_is_complete(enumerable):
    assert len(RESPONSES) == 781
    assert np.exp(log_probs_of(enumerable[0])).sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 2, 4])
@pytest.mark.parametrize("log_z", ["mlp", "group"])
def test_training_reaches_the_exact_optimum(enumerable, tmp_path, record_property, alpha, log_z):
    model, config = enumerable
    settings = [
        f"objective.alpha={alpha}",
        f"objective.log_z={log_z}",
        "precision.dtype=fp32",
        "rollout.prompts_per_step=1",
        "rollout.responses_per_prompt=512",
        "rollout.max_prompt_tokens=8",
        f"rollout.max_response_tokens={MAX_TOKENS}",
        "rollout.max_concurrent_rows=512",
        "parallel.micro_batch_size=512",
        "optimizer.lr=3e-3",
        "optimizer.lr_decay=cosine",
        "run.num_steps=400",
        f"run.output_dir={tmp_path / 'run'}",
        "checkpoint.interval=0",
        "metrics.wandb=off",
        "metrics.curves=false",
        "evaluation.samples=0",
    ]
    if log_z == "mlp":
        settings.append("optimizer.log_z_lr=1e-2")
    done = run_cli("train", config, *settings)
    assert done.returncode == 0, done.stderr
    target, lagrange = optimum(log_probs_of(model), alpha)
    trained = np.exp(log_probs_of(tmp_path / "run" / "hf_export"))
    distance = 0.5 * np.abs(trained - target).sum()
    base_distance = 0.5 * np.abs(np.exp(log_probs_of(model)) - target).sum()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    record_property("total_variation", distance)
    record_property("total_variation_of_base", base_distance)
    record_property("log_z_minus_lambda", last["log_z_mean"] - lagrange)
    difference = last["log_z_mean"] - lagrange
    print(f"alpha {alpha} {log_z}: TV {distance:.4f} (base {base_distance:.3f}), log Z' - lambda {difference:+.4f}")
    assert base_distance > 0.1  # there was something to learn
    assert distance <= 0.02
    assert last["log_z_mean"] == pytest.approx(lagrange, abs=0.02)
