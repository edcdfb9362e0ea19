"""Are a response's log-probs under the base the same bits, whatever shares its forward pass?

    python -m benchmarks.score_bits [--model models/SmolLM2-135M-Instruct] [--responses 8]

One process, fp32. The reference scores the same responses alone, two and four to a padded micro-batch, and packed, each
way twice. How many responses have the bits that they have alone, how many those of the same way the first time, and the
largest difference from alone. `model.reference_store` follows from it: what shares the pass is in a score's name.

Left out: layouts, which differ more (`benchmarks/layouts.py`); GPUs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from torch import Tensor

GROUP, PROMPT_TOKENS, RESPONSE_TOKENS, LARGEST_ID = 4, 20, 60, 300
WAYS = {
    "alone": {"micro_batch_size": 1},
    "two, padded": {"micro_batch_size": 2},
    "four, padded": {"micro_batch_size": 4},
    "packed to the longest": {"max_tokens_per_micro_batch": PROMPT_TOKENS + RESPONSE_TOKENS},
    "packed": {},
}


def make_rollouts(number: int) -> list:
    """Groups of GROUP, by slot, of random tokens and lengths."""
    import numpy as np

    from megatron_powerflow.records import Prompt, Rollout

    random, rollouts = np.random.default_rng(0), []
    for slot in range(number // GROUP):
        size = random.integers(2, PROMPT_TOKENS)
        prompt = Prompt(str(slot), slot, tuple(random.integers(3, LARGEST_ID, size).tolist()))
        for index in range(GROUP):
            response = tuple(random.integers(3, LARGEST_ID, random.integers(2, RESPONSE_TOKENS)).tolist())
            rollouts.append(Rollout(prompt, slot, index, response, (0.0,) * len(response), "eos"))
    return rollouts


def scores(rollouts: list, plan, session) -> dict[int, Tensor]:
    """The log-probs of each response under the reference, by rollout_index."""
    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.score import score_reference

    found = {}
    for batches in pack_updates(rollouts, plan, session, 0):
        for batch in score_reference(session.reference, batches, session.scorer):
            for row, index in enumerate(batch.rollout_index.tolist()):
                found[index] = batch.ref_log_probs[row][batch.loss_mask[row]].clone()
    return found


def measure(model: Path, number: int) -> dict[str, tuple[int, int, float]]:
    """way -> (responses with the bits of alone, with those of the first time, largest difference from alone)."""
    from megatron_powerflow.config_file import parse_config
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import Launch
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session

    with tempfile.TemporaryDirectory() as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        prompts.write_text('{"prompt_token_ids": [5]}\n' * (number // GROUP))
        values = {
            "model": {"hf_path": str(model)},
            "precision": {"dtype": "fp32"},
            "prompts": {"path": str(prompts)},
            "rollout": {
                "prompts_per_step": number // GROUP,
                "responses_per_prompt": GROUP,
                "max_prompt_tokens": PROMPT_TOKENS,
                "max_response_tokens": RESPONSE_TOKENS,
            },
            "run": {"output_dir": str(Path(scratch) / "run")},
        }
        plans = {way: make_plan(parse_config(values | {"parallel": sizes}), 1) for way, sizes in WAYS.items()}
        rollouts = make_rollouts(number)
        with initialized(plans["alone"].layout, Launch("alone", 0, 1, 0, 1), seed=0) as groups:
            session = build_session(plans["alone"], groups)
            found = {way: [scores(rollouts, plan, session) for _ in range(2)] for way, plan in plans.items()}
    alone = found["alone"][0]
    return {
        way: (
            sum(first[index].equal(alone[index]) for index in alone),
            sum(first[index].equal(again[index]) for index in alone),
            max(float((first[index] - alone[index]).abs().max()) for index in alone),
        )
        for way, (first, again) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--responses", type=int, default=8, help=f"a multiple of {GROUP}")
    arguments = parser.parse_args()

    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    from rich.table import Table

    from megatron_powerflow.console import make_console

    table = Table("way", "bits of alone", "bits of the same way again", "largest difference, nats")
    for way, (as_alone, as_before, difference) in measure(arguments.model, arguments.responses).items():
        of = f"of {arguments.responses}"
        table.add_row(way, f"{as_alone} {of}", f"{as_before} {of}", f"{difference:.1e}")
    make_console(width=100).print(table)


if __name__ == "__main__":
    main()
