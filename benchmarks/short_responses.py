"""How much faster is a step of short responses with the default batches than with four padded rollouts a pass?

    python -m benchmarks.short_responses [--rollouts 512] [--tokens 4] [--rounds 5]

One process, a toy of two layers and a width of 64: nearly all of a pass is fixed cost. Both ways go through packing,
`score_reference` and `update` of the same rollouts, in rounds that alternate within a minute; medians. The losses stand
beside, so that the ways are known to compute the same.

    padded    parallel.micro_batch_size=4, the default up to 0.2.0
    default   nothing said: packed by tokens

Left out: sampling, which is the same for both; GPUs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

WAYS = {"padded": {"micro_batch_size": 4}, "default": {}}
GROUP, PROMPT_TOKENS = 16, 8
MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512}


def config_of(way: str, model: Path, folder: Path, rollouts: int, tokens: int):
    from megatron_powerflow.config_file import parse_config

    return parse_config(
        {
            "model": {"hf_path": str(model)},
            "precision": {"dtype": "fp32"},
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "rollout": {
                "prompts_per_step": rollouts // GROUP,
                "responses_per_prompt": GROUP,
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": tokens,
            },
            "parallel": WAYS[way],
            "optimizer": {"lr": 0.0},
            "run": {"output_dir": str(folder / way)},
        }
    )


def make_rollouts(number: int, tokens: int) -> list:
    """Whole groups of GROUP, by slot; random tokens."""
    import numpy as np

    from megatron_powerflow.records import Prompt, Rollout

    random = np.random.default_rng(0)
    rollouts = []
    for slot in range(number // GROUP):
        prompt = Prompt(str(slot), slot, tuple(random.integers(3, 500, PROMPT_TOKENS).tolist()))
        for index in range(GROUP):
            response = tuple(random.integers(3, 500, tokens).tolist())
            rollouts.append(Rollout(prompt, slot, index, response, (0.0,) * tokens, "eos"))
    return rollouts


def one_step(rollouts: list, plan, session) -> tuple[int, float]:
    """(passes, loss) of a step from its rollouts to its update."""
    from megatron_powerflow.records import ROLLOUT_COLUMNS
    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.step import learn

    updates = pack_updates(rollouts, plan, session, 0)
    result = learn(plan, session, updates, step=1)  # no first step, whose calibration would be timed too
    return len(updates[0]), float(result.rows[:, ROLLOUT_COLUMNS.index("loss_term")].mean())


def measure(number: int, tokens: int, rounds: int) -> dict[str, tuple[int, float, float]]:
    """way -> (micro-batches of a step, seconds of a step, loss)."""
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import Launch
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session
    from tests.tiny_models import make_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "prompts.jsonl").write_text('{"prompt_token_ids": [5]}\n' * (number // GROUP))
        model = make_tiny_model(folder / "model", "llama", **MODEL)
        plans = {way: make_plan(config_of(way, model, folder, number, tokens), 1) for way in WAYS}
        rollouts = make_rollouts(number, tokens)
        with initialized(plans["default"].layout, Launch("alone", 0, 1, 0, 1), seed=0) as groups:
            session = build_session(plans["default"], groups)
            found = {way: one_step(rollouts, plans[way], session) for way in WAYS}  # warms up
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    start = time.perf_counter()
                    one_step(rollouts, plans[way], session)
                    seconds[way].append(time.perf_counter() - start)
    return {way: (found[way][0], statistics.median(seconds[way]), found[way][1]) for way in WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    from rich.table import Table

    from megatron_powerflow.console import make_console

    found = measure(arguments.rollouts, arguments.tokens, arguments.rounds)
    table = Table("batches", "passes", "seconds a step", "times as long as default", "loss")
    for way, (passes, seconds, loss) in found.items():
        table.add_row(way, str(passes), f"{seconds:.3f}", f"{seconds / found['default'][1]:.1f}", f"{loss:.6f}")
    make_console(width=100).print(table)


if __name__ == "__main__":
    main()
