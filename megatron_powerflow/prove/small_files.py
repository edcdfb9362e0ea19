"""How does the small model become a folder that a run can start from? Random weights, a tokenizer of words, prompts.

Weights are drawn so that every part of the model matters: no norm is 1, no bias 0, and the distribution over the next
token is neither flat nor certain. Some words are boxed answers, so that rewards of the text differ within a group.

Left out: the sizes (`small_model.py`), the config of the run (`small_config.py`). No torch.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_powerflow.hf.config import ModelDescription, read_architecture
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.shapes import expected_tensors
from megatron_powerflow.prove.small_model import STOP_TOKENS, VOCAB_SIZE

SCALE = 0.15  # standard deviation of weights; of a norm's, around 1
NUM_SPECIAL = 3  # <unk>, <s>, </s>
BOXES = range(STOP_TOKENS[-1] + 1, STOP_TOKENS[-1] + 41)  # tokens that are a boxed 0 or 1, an eighth of the vocabulary
ANSWER = "1"
MAX_PROMPT_TOKENS = 8


def write_model(folder: Path, fields: Mapping[str, Any], *, seed: int) -> ModelDescription:
    """Write a Hugging Face folder of random weights, and return what its config.json says of the model.

    fields: of config.json. Raises UserError where they describe no model.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=1), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that are the user's: said when that file was read
        model = read_architecture(folder, FAMILIES)
    _write_weights(folder / "model.safetensors", model, seed)
    _write_tokenizer(folder)
    return model


def write_prompts(path: Path, count: int, *, seed: int) -> None:
    """Write so many prompts of 2 to MAX_PROMPT_TOKENS random tokens, each with the answer 1."""
    draw = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        tokens = draw.integers(BOXES[-1] + 1, VOCAB_SIZE, size=draw.integers(2, MAX_PROMPT_TOKENS + 1))
        lines.append(json.dumps({"prompt_token_ids": tokens.tolist(), "answer": ANSWER}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def _write_weights(path: Path, model: ModelDescription, seed: int) -> None:
    from safetensors.numpy import save_file

    architecture, family = model
    draw = np.random.default_rng(seed)
    tensors = {}
    for name, shape in expected_tensors(architecture, family).items():
        middle = 1.0 if "norm" in name and not architecture.zero_centered_norms else 0.0
        tensors[name] = (middle + SCALE * draw.standard_normal(shape)).astype(np.float32)
    save_file(tensors, path, metadata={"format": "pt"})


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words: <unk>, <s>, </s>, w3, w4, ..., and boxed numbers in between."""
    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(NUM_SPECIAL, VOCAB_SIZE))]
    for number, token in enumerate(BOXES):  # 0, 1, 0.0, 1.0, 0.00, ...
        words[token] = f"\\boxed{{{number % 2}.{'0' * (number // 2)}}}".replace(".}", "}")
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": words[i], "special": True, **kinds} for i in range(NUM_SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": words[0]},
    }
    special = {"unk_token": words[0], "bos_token": words[1], "eos_token": words[2]}
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
