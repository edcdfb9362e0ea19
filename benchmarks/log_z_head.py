"""Does the log Z' head stay calibrated at any width, and does it learn? Regression on real prompt states, three heads.

    python -m benchmarks.log_z_head [--hf-path DIR] [--prompts FILE] [--widths 576 1536 3584 4096 8192] [--steps 200]

Prompts are pooled by the model, their states multiplied by a random matrix to each width. The wanted log Z' of a prompt
is a common value and a part of its own of standard deviation .1; each step takes a batch of prompts and gives 16
residuals of each, with noise of .4. Every head starts at the calibrated value of the first batch.

    adam    the head as it was: two trained hidden layers as wide as the model, AdamW 1e-3, gradients clipped at 1
    ours    `LogZHead` at its default rate
    group   no head: minus the mean of the prompt's 16 partial residuals; its error is .4 / sqrt(16) whatever happens

and three kinds of wanted value: `smooth` (along the eight main directions of the states), `any` (drawn for each
prompt), `drift` (smooth, and all sink by .006 a step, as in training). Printed: RMS error over all prompts after the
first step, the worst of all steps, the mean of the last ten.

Left out: a policy that moves; the product's own runs at these widths (README.md beside this file has them).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

WIDTHS = (576, 1536, 3584, 4096, 8192)
SPREAD, NOISE, RESPONSES, DRIFT = 0.1, 0.4, 16, -0.006
KINDS = ("smooth", "any", "drift")
HEADS = ("adam", "ours", "group")
START = -0.9


def prompt_states(hf_path: Path, prompts: Path, num_prompts: int, max_tokens: int) -> Tensor:
    """[P, H] fp32: the mean of the final hidden states of each prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(hf_path)
    network = AutoModelForCausalLM.from_pretrained(hf_path, dtype=torch.float32).eval()
    found = []
    for line in prompts.read_text().splitlines()[:num_prompts]:
        messages = json.loads(line)["messages"]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            hidden = network.base_model(torch.tensor([tokens[:max_tokens]])).last_hidden_state
        found.append(hidden[0].mean(dim=0))
    return torch.stack(found)


def projected(states: Tensor, width: int) -> Tensor:
    """[P, width]: the states themselves, or a fixed random matrix of them that keeps distances on average."""
    if width == states.shape[1]:
        return states
    matrix = torch.randn(states.shape[1], width, generator=torch.Generator().manual_seed(1))
    return states @ matrix / states.shape[1] ** 0.5


def wanted_values(states: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """[P] of mean START and standard deviation SPREAD."""
    if kind == "any":
        values = torch.randn(len(states), generator=generator)
    else:
        directions, _, _ = torch.linalg.svd(states - states.mean(dim=0), full_matrices=False)
        values = directions[:, :8] @ torch.randn(8, generator=generator)
    return START + SPREAD * (values - values.mean()) / values.std()


class AdamHead(nn.Module):
    """The head of the versions before: Adam moves all of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        hidden = [part for _ in range(2) for part in (nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))]
        self.body, self.last = nn.Sequential(*hidden), nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def forward(self, pool: Tensor) -> Tensor:
        return self.last(self.body(pool)).squeeze(-1)

    def start(self, pool: Tensor, log_z: float) -> None:
        nn.init.constant_(self.last.bias, log_z)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()


def our_head(width: int) -> nn.Module:
    from megatron_powerflow.config_file import parse_config
    from megatron_powerflow.model.log_z_head import LogZHead

    sections = {"model": {"hf_path": "-"}, "prompts": {"path": "-"}, "run": {"output_dir": "-"}}
    config = parse_config(sections | {"objective": {"log_z": "mlp"}})

    class Ours(LogZHead):
        def start(self, pool: Tensor, log_z: float) -> None:
            self.calibrate(log_z)
            self.centre(pool, lambda values: values.double().mean(dim=0))
            self.rate = config.optimizer.log_z_lr

        def step(self) -> None:
            super().step(1.0)

    return Ours(width, kind="mlp", detach=True, seed=0)


def errors_of(head: nn.Module, states: Tensor, wanted: Tensor, drift: float, batch: int, steps: int) -> list[float]:
    """RMS error over all prompts after each step."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for step in range(steps):
        chosen = torch.randperm(len(states), generator=generator)[:batch]
        noise = NOISE * torch.randn(batch, RESPONSES, generator=generator)
        partial = noise - (wanted[chosen] + step * drift)[:, None]  # the residual without log Z'
        if step == 0:
            head.start(states[chosen], -float(partial.mean()))
        head.zero_grad()
        (head(states[chosen])[:, None] + partial).square().mean().backward()
        head.step()
        with torch.no_grad():
            errors.append(float((head(states) - wanted - step * drift).square().mean().sqrt()))
    return errors


def compare(
    states: Tensor, *, widths: tuple[int, ...], heads: tuple[str, ...], kinds: tuple[str, ...], batch: int, steps: int
) -> tuple[list[str], dict[tuple[int, str, str], list[float]]]:
    """(the table's lines, the errors of each width, kind and head)."""
    lines = ["| width | wanted | head | first step | worst | last ten |", "|---|---|---|---|---|---|"]
    found = {}
    make: dict[str, Callable[[int], nn.Module]] = {"adam": AdamHead, "ours": our_head}
    for width in widths:
        own_states = projected(states, width)
        for kind in kinds:
            wanted = wanted_values(states, kind, torch.Generator().manual_seed(2))
            for name in heads:
                if name == "group":
                    errors = [NOISE / RESPONSES**0.5] * steps
                else:
                    drift = DRIFT if kind == "drift" else 0.0
                    errors = errors_of(make[name](width), own_states, wanted, drift, batch, steps)
                found[width, kind, name] = errors
                last = sum(errors[-10:]) / len(errors[-10:])
                lines.append(f"| {width} | {kind} | {name} | {errors[0]:.3f} | {max(errors):.3f} | {last:.3f} |")
                print(lines[-1], flush=True)
    return lines, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-path", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--prompts", type=Path, default=Path("examples/prompts/mixed.jsonl"))
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each prompt, from its start")
    parser.add_argument("--states", type=Path, help="pooled states that torch.save wrote, in place of the model")
    parser.add_argument("--batch", type=int, default=32, help="prompts a step")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--heads", choices=HEADS, nargs="+", default=HEADS)
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if args.states:
        states = torch.load(args.states, weights_only=True)
    else:
        states = prompt_states(args.hf_path, args.prompts, args.num_prompts, args.prompt_tokens)
    sizes = {"widths": tuple(args.widths), "heads": tuple(args.heads), "kinds": tuple(args.kinds)}
    compare(states, **sizes, batch=min(args.batch, len(states)), steps=args.steps)


if __name__ == "__main__":
    main()
