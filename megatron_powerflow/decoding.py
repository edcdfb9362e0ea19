"""How do the training-free rivals answer a file of prompts? `powerflow generate --decoding power_sampling|verbalized`.

Both draw from the engine that training uses, under any layout. Power sampling asks the training scorer as well;
verbalized sampling lets the model write several responses, and their probabilities, in one answer.

Left out: low and high temperature, which are `rollout.temperature`; the arithmetic of the chain
(`rollout/power_sampling.py`) and the reading of answers (`data/verbalized.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from megatron_powerflow.data.verbalized import parse_verbalized, verbalized_row
from megatron_powerflow.inference import (
    GENERATE_KEYS,
    Opened,
    build_engine,
    load_chunks,
    load_generation_prompts,
    log_probs_by_slot,
    prompts_per_round,
    sampling_params,
)
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.output_lines import BY_GENERATE, output_refusals, write_rounds
from megatron_powerflow.parallel.collectives import from_last_stage, gather_to_main
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import Launch, initialized
from megatron_powerflow.records import Prompt, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import Engine
from megatron_powerflow.rollout.power_sampling import Chain, PowerSampling, block_limits, power_sampling
from megatron_powerflow.targets import require
from megatron_powerflow.training.forward_step import Scorer

# The temperatures of power sampling are 1 and 1/alpha; it scores, so it takes a micro-batch size. Its chains end when
# they end, so ranks that shared experts would wait for each other.
_NOT_HERE = ("rollout.temperature", "parallel.ep")
POWER_SAMPLING_KEYS = (*(key for key in GENERATE_KEYS if key not in _NOT_HERE), "parallel.micro_batch_size")


def power_sample_file(
    opened: Opened,
    prompts_name: str | Path,
    out: Path,
    num_responses: int,
    recipe: PowerSampling,
    launch: Launch,
    console: Console,
) -> None:
    """One line per chain, num_responses chains a prompt: id, response_index, text, response_token_ids, log_probs (at
    temperature 1), finish_reason, num_accepted and num_moves."""
    require(output_refusals(out, *BY_GENERATE))
    max_tokens = opened.config.rollout.max_response_tokens
    num_moves = len(block_limits(max_tokens, recipe.num_blocks)) * recipe.num_moves
    prompts = load_generation_prompts(opened, prompts_name, launch, console)
    sampling = sampling_params(opened, responses_per_prompt=1, temperature=1 / recipe.alpha)
    with initialized(opened.layout, launch, seed=sampling.seed) as groups:
        chunks = load_chunks(opened, groups)
        engine = build_engine(opened, chunks, groups)
        scorer = Scorer(groups, opened.architecture.vocab_size, 1.0, opened.layout.sequence_parallel)
        run = partial(
            power_sampling,
            recipe=recipe,
            max_tokens=max_tokens,
            seed=sampling.seed,
            rows_per_call=opened.config.rollout.max_concurrent_rows,
            propose=partial(_propose, engine, sampling),
            score=partial(_score, opened, chunks, scorer),
        )
        reports = groups.pp_rank == 0 and groups.tp_rank == 0

        def one_round(mine: Sequence[tuple[int, Prompt]]) -> list[tuple[int, dict]] | None:
            numbered = [(slot * num_responses + r, prompt) for slot, prompt in mine for r in range(num_responses)]
            lines = [(chain.number, _chain_line(chain, num_responses, num_moves, opened)) for chain in run(numbered)]
            return lines if reports else None

        per_round = prompts_per_round(opened, num_responses)
        write_rounds(
            list(enumerate(prompts)), one_round, per_round, out, groups, console, "powerflow generate --decoding power"
        )


def _propose(
    engine: Engine, sampling: SamplingParams, prompts: Sequence[tuple[int, Prompt]], max_tokens: int, step: int
) -> list[Rollout]:
    return engine.generate(prompts, replace(sampling, max_response_tokens=max_tokens, step=step))


def _score(
    opened: Opened, chunks: Sequence[PolicyModel], scorer: Scorer, rollouts: Sequence[Rollout]
) -> list[np.ndarray]:
    """Log-probs of the last stage on every rank of the replica: all of them run the chain and must agree."""
    found = log_probs_by_slot(rollouts, chunks, scorer, opened)
    lengths = [len(rollout.response_token_ids) for rollout in rollouts]
    flat = None
    if found:
        flat = torch.tensor([value for rollout in rollouts for value in found[rollout.slot]], dtype=torch.float64)
    flat = from_last_stage(flat, (sum(lengths),), scorer.groups).numpy()
    return np.split(flat, np.cumsum(lengths)[:-1])


def _chain_line(chain: Chain, num_responses: int, num_moves: int, opened: Opened) -> dict:
    state = chain.state
    return {
        "id": chain.prompt.id,
        "response_index": chain.number % num_responses,
        "text": opened.tokenizer.decode(state.token_ids),
        "response_token_ids": list(state.token_ids),
        "log_probs": state.log_probs.tolist(),
        "finish_reason": "eos" if state.ended else "length",
        "num_accepted": chain.num_accepted,
        "num_moves": num_moves,
    }


@dataclass(frozen=True)
class VerbalizedSampling:
    """num_responses: asked for in one answer; target_words: asked for in each, None: not mentioned; temperature 0:
    greedy."""

    num_responses: int
    target_words: int | None
    temperature: float


def verbalize_file(
    opened: Opened, prompts_name: str | Path, out: Path, recipe: VerbalizedSampling, launch: Launch, console: Console
) -> None:
    """One line per verbalized response: id, response_index, text, probability (as stated, not renormalised).

    Responses that cannot be read have no line; they are counted, by reason, in what is printed.
    """
    require(output_refusals(out, *BY_GENERATE))
    rewrite = partial(verbalized_row, num_responses=recipe.num_responses, target_words=recipe.target_words)
    prompts = load_generation_prompts(opened, prompts_name, launch, console, rewrite)
    sampling = sampling_params(opened, responses_per_prompt=1, temperature=recipe.temperature)
    failures: Counter[str] = Counter()
    with initialized(opened.layout, launch, seed=sampling.seed) as groups:
        engine = build_engine(opened, load_chunks(opened, groups), groups)
        reports = groups.pp_rank == 0 and groups.tp_rank == 0

        def one_round(mine: Sequence[tuple[int, Prompt]]) -> list[tuple[int, dict]] | None:
            rollouts = engine.generate(mine, sampling)
            if not reports:
                return None
            lines = []
            for rollout in rollouts:
                found = parse_verbalized(opened.tokenizer.decode(rollout.response_token_ids), recipe.num_responses)
                failures.update(found.failures)
                for index, response in enumerate(found.responses):
                    line = {"id": rollout.prompt.id, "response_index": index}
                    lines.append((rollout.slot, {**line, "text": response.text, "probability": response.probability}))
            return lines

        items = list(enumerate(prompts))
        write_rounds(
            items,
            one_round,
            prompts_per_round(opened, 1),
            out,
            groups,
            console,
            "powerflow generate --decoding verbalized",
        )
        _report_failures(failures, len(prompts) * recipe.num_responses, groups, console)


def _report_failures(failures: Counter[str], num_asked: int, groups: Groups, console: Console) -> None:
    everyone = gather_to_main(failures, groups)
    total = sum(everyone, Counter()) if everyone is not None else Counter()
    for reason, count in total.most_common():
        console.print(f"of {num_asked} responses asked for, {count} not written: {reason}")
