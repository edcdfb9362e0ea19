"""How much faster is a step whose rollouts are packed? Tokens a second of scoring and updating, one process.

    python -m benchmarks.packed_against_padded [--hf-path DIR] [--rollouts 64] [--rounds 3]

Responses of 16 to 512 tokens, log-normal (median 90, sigma 0.9), prompts of 16 to 64; their tokens are random, which
changes no time. A micro-batch of each way holds as many positions at most (`--budget`), which is what bounds memory.
Every way goes through `score_reference` and `update`, in rounds that alternate; the fastest round of each counts. The
losses stand beside, so that the ways are known to compute the same.

    random order    rows in the order in which they came, padded to the longest of their micro-batch
    by length       rows sorted by length, padded (what parallel.micro_batch_size does)
    packed          parallel.max_tokens_per_micro_batch

Left out: sampling; the balance over data-parallel ranks; GPUs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SHORTEST, LONGEST, MEDIAN, SIGMA = 16, 512, 90, 0.9
LONGEST_PROMPT = 64
GROUP = 8
WAYS = ("random order", "by length", "packed")
# a random model of 4 M parameters, when none is named
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "max_position_embeddings": 1024,
    "scale": 0.02,
}


def make_rollouts(number: int, vocab_size: int, seed: int = 0) -> list:
    """Whole groups of GROUP, by slot."""
    from megatron_powerflow.records import Prompt, Rollout

    random = np.random.default_rng(seed)
    rollouts = []
    for slot in range(number // GROUP):
        prompt = tuple(random.integers(3, vocab_size, random.integers(16, LONGEST_PROMPT + 1)).tolist())
        for index in range(GROUP):
            length = int(np.clip(random.lognormal(np.log(MEDIAN), SIGMA), SHORTEST, LONGEST))
            response = tuple(random.integers(3, vocab_size, length).tolist())
            rollouts.append(Rollout(Prompt(str(slot), slot, prompt), slot, index, response, (0.0,) * length, "eos"))
    return rollouts


def config_of(way: str, model: Path, folder: Path, number: int, budget: int):
    from megatron_powerflow.config_file import parse_config

    rows = budget // (LONGEST + LONGEST_PROMPT)
    parallel = {"max_tokens_per_micro_batch": budget} if way == "packed" else {"micro_batch_size": rows}
    return parse_config(
        {
            "model": {"hf_path": str(model)},
            "precision": {"dtype": "fp32"},
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "rollout": {
                "prompts_per_step": number // GROUP,
                "responses_per_prompt": GROUP,
                "max_prompt_tokens": LONGEST_PROMPT,
                "max_response_tokens": LONGEST,
            },
            "parallel": parallel,
            "objective": {"log_z": "mlp"},
            "optimizer": {"lr": 0.0, "log_z_lr": 0.0},
            "run": {"output_dir": str(folder / way.replace(" ", "_"))},
        }
    )


def batches_of(way: str, rollouts: list, plan, session) -> list:
    """The micro-batches of one update."""
    from megatron_powerflow.data.packing import pack
    from megatron_powerflow.training.micro_batches import pack_updates
    from megatron_powerflow.training.rewards import annotate

    if way != "random order":
        (batches,) = pack_updates(rollouts, plan, session, 0)
        return batches
    annotated = annotate(rollouts, plan.config.objective, plan.tokenizer)
    size = plan.config.parallel.micro_batch_size
    order = np.random.default_rng(1).permutation(len(annotated))
    return [
        pack(
            [annotated[place] for place in order[start : start + size]],
            micro_batch_size=size,
            responses_per_prompt=GROUP,
            drop_truncated=False,
            multiple=1,
            uniform=False,
            device=session.groups.device,
        )[0]
        for start in range(0, len(annotated), size)
    ]


def one_step(batches: list, plan, session) -> float:
    """The loss of the step."""
    from megatron_powerflow.records import ROLLOUT_COLUMNS
    from megatron_powerflow.training.step import learn

    result = learn(plan, session, [batches], step=1)  # no first step, whose calibration would be timed too
    return float(result.rows[:, ROLLOUT_COLUMNS.index("loss_term")].mean())


def measure(model: Path, folder: Path, number: int, budget: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """way -> (seconds of the fastest round, share of positions that are padding, loss)."""
    from megatron_powerflow.model.stream import extent
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import Launch
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session

    plans = {way: make_plan(config_of(way, model, folder, number, budget), 1) for way in WAYS}
    first = plans[WAYS[0]]
    rollouts = make_rollouts(number, first.architecture.vocab_size)
    num_tokens = count_tokens(rollouts)
    with initialized(first.layout, Launch("alone", 0, 1, 0, 1), seed=0) as groups:
        session = build_session(first, groups)
        batches = {way: batches_of(way, rollouts, plans[way], session) for way in WAYS}
        positions = {way: sum(int(np.prod(extent(batch))) for batch in batches[way]) for way in WAYS}
        losses = {way: one_step(batches[way], plans[way], session) for way in WAYS}  # a round to warm up
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                seconds[way].append(timed(lambda way=way: one_step(batches[way], plans[way], session)))
    return {way: (min(seconds[way]), 1 - num_tokens / positions[way], losses[way]) for way in WAYS}


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def count_tokens(rollouts: list) -> int:
    return sum(len(rollout.prompt.token_ids) + len(rollout.response_token_ids) for rollout in rollouts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hf-path", type=Path, help="model; default: a random one of 4 M parameters")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--budget", type=int, default=4608, help="positions of a micro-batch, at most")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    from megatron_powerflow.parallel.initialize import prepare_imports

    prepare_imports()
    import torch
    from rich.table import Table

    from megatron_powerflow.console import make_console
    from tests.tiny_models import make_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "prompts.jsonl").write_text('{"prompt_token_ids": [5]}\n' * (arguments.rollouts // GROUP))
        model = arguments.hf_path or make_tiny_model(folder / "model", "llama", **MODEL)
        found = measure(model, folder, arguments.rollouts, arguments.budget, arguments.rounds)
    num_tokens = count_tokens(make_rollouts(arguments.rollouts, 100))
    table = Table("micro-batches", "padding", "seconds", "tokens/s", "packed is faster by", "loss")
    for way, (seconds, padding, loss) in found.items():
        ratio = seconds / found["packed"][0]
        table.add_row(
            way, f"{padding:.0%}", f"{seconds:.2f}", f"{num_tokens / seconds:,.0f}", f"{ratio:.2f} x", f"{loss:.6f}"
        )
    console = make_console(width=110)
    console.print(table)
    console.print(
        f"{arguments.rollouts} rollouts, {num_tokens:,} tokens, micro-batches of at most {arguments.budget} positions, "
        f"{torch.get_num_threads()} thread(s), fastest of {arguments.rounds} rounds, scoring + update",
    )


if __name__ == "__main__":
    main()
