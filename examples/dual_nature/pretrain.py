"""How is a base model made? A 167,000-parameter Llama learns the corpus by next-token prediction, in minutes.

    python -m examples.dual_nature.pretrain --out bases g2 g0 g1 g3 aligned

G2 is trained from scratch; the others continue from it for a few hundred steps. Each is an ordinary Hugging Face
folder, and `model.hf_path` of a run; beside them are `train.jsonl` and `held_out.jsonl`. What is there already is kept.

Left out: the corpus (`corpus.py`), what the models turned out to be (`measure.py`), fine-tuning.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from examples.dual_nature import corpus
from examples.dual_nature import vocabulary as v
from megatron_powerflow.whole_files import give_usual_mode

NUM_TRAIN = 4000
MARKED_IN_PRETRAINING = 0.5  # the few subtractions are as hard to learn as the many additions
PARTS = 4  # of a batch, cut by length, so that little of them is padding
IGNORED = -100
# read by transformers and by the package: what rope and norm say is what both compute
ARCHITECTURE = {
    "vocab_size": v.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.05,
    "bos_token_id": v.BOS,
    "eos_token_id": v.EOS,
    "pad_token_id": v.PAD,
}


@dataclass(frozen=True)
class Recipe:
    """start: the base it continues from; None: random weights. lr: the highest, reached after warmup_steps."""

    start: str | None
    num_steps: int
    lr: float
    batch_size: int = 128
    warmup_steps: int = 100


RECIPES = {
    "g2": Recipe(None, num_steps=2200, lr=3e-3),
    "g0": Recipe("g2", num_steps=400, lr=1e-3, warmup_steps=20),
    "g1": Recipe("g2", num_steps=350, lr=1e-3, warmup_steps=20),
    "g3": Recipe("g2", num_steps=350, lr=1e-3, warmup_steps=20),
    "aligned": Recipe("g2", num_steps=250, lr=1e-3, warmup_steps=20),
}


def make_base(name: str, out: Path, *, seed: int = 0) -> Path:
    """The folder of one base, and of those it continues from; those that exist are kept."""
    folder = out / name
    if (folder / "model.safetensors").is_file():
        return folder
    recipe = RECIPES[name]
    if recipe.start is None:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**ARCHITECTURE))
    else:
        model = LlamaForCausalLM.from_pretrained(make_base(recipe.start, out, seed=seed), dtype=torch.float32)
    pretrain(model, corpus.SETTINGS[name], recipe, seed=seed, name=name)
    save(model, folder)
    return folder


def pretrain(model: LlamaForCausalLM, setting: corpus.Setting, recipe: Recipe, *, seed: int, name: str) -> list[float]:
    """Trains in place; the loss of each step, in nats per response token. A function of seed, on one thread count."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.01)
    batches = draw_batches(setting, recipe.batch_size, random.Random(f"{seed} {name}"))
    losses, start = [], time.monotonic()
    model.train()
    for step in range(recipe.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_factor(step, recipe)
        parts = next(batches)
        num_tokens = sum(int((labels != IGNORED).sum()) for _, labels in parts)
        optimizer.zero_grad()
        loss = 0.0
        for tokens, labels in parts:
            # one position earlier: position t predicts token t + 1
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            summed = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            (summed / num_tokens).backward()  # of the batch: a mean within its parts would favour short responses
            loss += summed.item() / num_tokens
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss)
        if (step + 1) % 100 == 0 or step + 1 == recipe.num_steps:
            recent = sum(losses[-100:]) / len(losses[-100:])
            print(
                f"{name}: step {step + 1}/{recipe.num_steps}, {recent:.4f} nats per token, "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
    model.eval()
    return losses


def lr_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from 1 to 0.05."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(recipe.num_steps - recipe.warmup_steps, 1)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


def draw_batches(setting: corpus.Setting, batch_size: int, rng: random.Random) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Endless batches, each PARTS pairs (tokens, labels) of [batch_size / PARTS, longest of the part]."""
    held_out = set(corpus.split_questions(0)[1])
    while True:
        rows: list[tuple[list[int], list[int]]] = []
        while len(rows) < batch_size:
            question = corpus.draw_question(rng, marked_share=MARKED_IN_PRETRAINING)
            if question not in held_out:
                rows.append((question.token_ids, corpus.draw_response(question, setting, rng)))
        rows.sort(key=lambda row: len(row[1]))
        bounds = [batch_size * part // PARTS for part in range(PARTS + 1)]
        yield [collate(rows[start:stop]) for start, stop in pairwise(bounds)]


def collate(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of (prompt, response) pairs, padded at the right; labels are IGNORED on prompt and padding."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((len(rows), longest), v.PAD)
    labels = torch.full((len(rows), longest), IGNORED)
    for row, (prompt, response) in enumerate(rows):
        whole = torch.tensor(prompt + response)
        tokens[row, : len(whole)] = whole
        labels[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return tokens, labels


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """A Hugging Face folder: fp32 safetensors, config, generation config, tokenizer."""
    model.generation_config = GenerationConfig(
        bos_token_id=v.BOS, eos_token_id=v.EOS, pad_token_id=v.PAD, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        give_usual_mode(path)
    v.write_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=RECIPES, metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder of the bases and prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    train, held_out = corpus.split_questions(NUM_TRAIN)
    corpus.write_prompts(arguments.out / "train.jsonl", train)
    corpus.write_prompts(arguments.out / "held_out.jsonl", held_out)
    for name in arguments.names:
        print(f"{name}: {make_base(name, arguments.out, seed=arguments.seed)}")


if __name__ == "__main__":
    main()
