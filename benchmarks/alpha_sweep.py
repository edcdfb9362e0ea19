"""What does a sweep over alpha pay for the reference, with `model.reference_store` and without?

    python -m benchmarks.alpha_sweep [--model models/SmolLM2-135M-Instruct] [--steps 2] [--alphas 1.5 2 4 8 16]

One process, fp32. The rollouts of a few steps are sampled once and saved; each alpha then trains on them twice: without
a store, and with the one that all of them share. The passes of the reference are counted, its seconds and those of the
steps are taken, and the weights at the end are compared bit by bit, by a sum that every bit of them counts in.

Left out: the pass over the first prompts that each start makes before it samples or trains (`first_batch.py`), which
asks whether the base's numbers are finite on this machine, and no store answers that; several processes, which
tests/distributed/test_reference_store.py has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TEXTS = (
    "What is 17 times 23?",
    "Name three rivers of Europe and the seas that they flow into.",
    "A train leaves at noon and travels 80 km an hour. When has it come 200 km?",
    "Why is the sky blue?",
)
RESPONSES, RESPONSE_TOKENS = 4, 64


@dataclass(frozen=True)
class Run:
    """What a run of the sweep took. weights: of the policy at the end, 16 digits; losses: of each step."""

    passes: int
    reference_seconds: float
    seconds: float
    weights: str
    losses: tuple[float, ...]


def config_of(model: Path, folder: Path, name: str, steps: int, *overrides: str):
    from megatron_powerflow.config_file import parse_config

    return parse_config(
        {
            "model": {"hf_path": str(model)},
            "precision": {"dtype": "fp32"},
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "rollout": {
                "prompts_per_step": len(TEXTS),
                "responses_per_prompt": RESPONSES,
                "max_prompt_tokens": 64,
                "max_response_tokens": RESPONSE_TOKENS,
            },
            "objective": {"log_z": "group"},
            "optimizer": {"lr": 1e-5},
            "metrics": {"wandb": "off", "curves": False},
            "run": {"num_steps": steps, "output_dir": str(folder / name)},
        },
        overrides,
    )


def train(config) -> Run:
    """Make the steps of a config, without checkpoints."""
    from megatron_powerflow.checkpoint.storage import weights_sum
    from megatron_powerflow.data.prompts import PromptStream
    from megatron_powerflow.metrics.throughput import PhaseClock
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import Launch
    from megatron_powerflow.records import ROLLOUT_COLUMNS
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session
    from megatron_powerflow.training.step import run_step

    plan = make_plan(config, 1)
    with initialized(plan.layout, Launch("alone", 0, 1, 0, 1), seed=config.run.seed) as groups:
        session, clock, passes, losses = build_session(plan, groups), PhaseClock(), 0, []
        stream = PromptStream(plan.prompts, seed=0, shuffle=False, position=0)
        reference = seconds = 0.0
        for step in range(config.run.num_steps):
            start = time.perf_counter()
            result = run_step(plan, session, stream.take(config.rollout.prompts_per_step), step, phase=clock)
            seconds += time.perf_counter() - start
            taken = clock.take()
            # of a start's first step it holds the pass over the prompts, which is made beside the rollouts'
            reference += taken["reference"]
            passes += result.reference.passes
            losses.append(float(result.rows[:, ROLLOUT_COLUMNS.index("loss_term")].mean()))
        return Run(passes, reference, seconds, weights_sum(session.trainable.chunks, groups), tuple(losses))


def sweep(model: Path, alphas: list[float], steps: int, folder: Path) -> list[tuple[float, Run, Run]]:
    """(alpha, the run without a store, the run with the shared one) of each alpha."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    saved = config_of(model, folder, "saved", steps, "rollout.save=true", "prompts.as=chat", "optimizer.lr=0")
    train(saved)
    replay = ["prompts.as=chat", f"rollout.replay={folder / 'saved' / 'rollouts'}"]
    found = []
    for alpha in alphas:
        asked = [*replay, f"objective.alpha={alpha}"]
        fresh = train(config_of(model, folder, f"fresh_{alpha:g}", steps, *asked))
        kept = [*asked, f"model.reference_store={folder / 'store'}"]
        found.append((alpha, fresh, train(config_of(model, folder, f"kept_{alpha:g}", steps, *kept))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--alphas", type=float, nargs="+", default=[1.5, 2.0, 4.0, 8.0, 16.0])
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()

    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    from rich.table import Table

    from megatron_powerflow.console import make_console

    with tempfile.TemporaryDirectory() as scratch:
        found = sweep(arguments.model, arguments.alphas, arguments.steps, Path(scratch))
        size = sum(file.stat().st_size for file in (Path(scratch) / "store").iterdir())
    table = Table("alpha", "passes", "with store", "reference s", "with store", "steps s", "with store", "bit-equal")
    for alpha, fresh, kept in found:
        same = (fresh.weights, fresh.losses) == (kept.weights, kept.losses)
        table.add_row(f"{alpha:g}", *numbers_of([fresh], [kept]), "yes" if same else "NO")
    ends = len({kept.weights for _, _, kept in found})
    table.add_row("all", *numbers_of(*zip(*(pair[1:] for pair in found), strict=True)), f"{ends} different ends")
    make_console(width=120).print(table)
    print(f"the store holds {size:,} bytes")


def numbers_of(fresh: Sequence[Run], kept: Sequence[Run]) -> list[str]:
    """Passes, seconds of the reference and of the steps, of the runs together: without a store and with it."""
    names = {"passes": "d", "reference_seconds": ".2f", "seconds": ".2f"}
    return [
        format(sum(getattr(run, name) for run in runs), form) for name, form in names.items() for runs in (fresh, kept)
    ]


if __name__ == "__main__":
    main()
