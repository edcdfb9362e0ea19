"""Which tokens is the synthetic world written in, and how do they become text?

One token per word: 97 numbers, 10 signed operands, a box around the answer, and a handful of words. Text is the tokens
with spaces between, so that `\\boxed{ 42 }` is what any reader of boxed answers finds.

Left out: what the tokens mean (`corpus.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

MODULUS = 97
MAX_OPERAND = 5
SYNONYMS = ("then", "next", "now", "so", "and", "hence")  # the answer does not depend on which one is written
SIGNED = tuple(f"{sign}{size}" for sign in "+-" for size in range(1, MAX_OPERAND + 1))
FIRST_WORDS = ("<pad>", "<bos>", "<eos>", "=", "\\boxed{", "}", "think", "check", "aside", "hmm")
WORDS = (*FIRST_WORDS, *SYNONYMS, *SIGNED, *map(str, range(MODULUS)))
TOKEN_OF = {word: token for token, word in enumerate(WORDS)}
PAD, BOS, EOS, EQUALS, BOX, CLOSE, THINK, CHECK, ASIDE, HMM = range(10)
FIRST_SYNONYM = TOKEN_OF[SYNONYMS[0]]
FIRST_NUMBER = TOKEN_OF["0"]
VOCAB_SIZE = len(WORDS)


def number_token(value: int) -> int:
    return FIRST_NUMBER + value % MODULUS


def operand_token(operand: int) -> int:
    """operand: -9..-1 or 1..9."""
    return TOKEN_OF[f"{operand:+d}"]


def text_of(tokens: list[int]) -> str:
    """What the tokenizer of `write_tokenizer` decodes, special tokens included."""
    return " ".join(WORDS[token] for token in tokens)


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a word-level tokenizer, as transformers reads them."""
    special = [
        {"id": token, "content": WORDS[token], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for token in (PAD, BOS, EOS)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": TOKEN_OF, "unk_token": WORDS[PAD]},
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": WORDS[PAD],
        "bos_token": WORDS[BOS],
        "eos_token": WORDS[EOS],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
