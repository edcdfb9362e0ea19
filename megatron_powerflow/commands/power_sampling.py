"""How does power sampling answer a file of prompts? The other training-free rival: `powerflow generate --decoding
power_sampling`. It draws from the engine of training and asks its scorer, under any layout.

Left out: the arithmetic of the chain (`rollout/power_sampling.py`). Low and high temperature need no command of their
own: they are `rollout.temperature`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from megatron_powerflow.commands.generate import load_generation_prompts, prompts_per_round, sampling_of_answers
from megatron_powerflow.commands.open_model import GENERATE_KEYS, OpenModel, engine_of, load_chunks
from megatron_powerflow.commands.rounds import BY_GENERATE, output_refusals, write_rounds
from megatron_powerflow.commands.score import log_probs_by_slot
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.parallel.collectives import from_last_stage
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.records import Prompt, Rollout, SamplingParams
from megatron_powerflow.rollout.engine import Engine
from megatron_powerflow.rollout.power_sampling import Chain, PowerSampling, block_limits, power_sampling
from megatron_powerflow.targets import require
from megatron_powerflow.training.forward_step import Scorer

# The temperatures of power sampling are 1 and 1/alpha; it scores, so it takes a micro-batch size. Its chains end when
# they end, so ranks that shared experts would wait for each other.
_KEYS_WITHOUT_EFFECT = ("rollout.temperature", "parallel.ep")


POWER_SAMPLING_KEYS = (*(key for key in GENERATE_KEYS if key not in _KEYS_WITHOUT_EFFECT), "parallel.micro_batch_size")


def power_sample_file(
    opened: OpenModel,
    prompts_name: str | Path,
    out: Path,
    num_responses: int,
    recipe: PowerSampling,
    launch: Launch,
    console: Console,
) -> None:
    """Answer a file of prompts by power sampling: num_responses chains a prompt, one JSON line per chain.

    A line holds id, response_index, text, response_token_ids, log_probs (nats, at temperature 1), finish_reason,
    num_accepted and num_moves. Raises UserError when `out` may not be written, or as `load_generation_prompts` does.
    """
    require(output_refusals(out, *BY_GENERATE))
    max_tokens = opened.config.rollout.max_response_tokens
    num_moves = len(block_limits(max_tokens, recipe.num_blocks)) * recipe.num_moves
    prompts = load_generation_prompts(opened, prompts_name, launch, console)
    sampling = sampling_of_answers(opened, responses_per_prompt=1, temperature=1 / recipe.alpha)
    with initialized(opened.layout, launch, seed=sampling.seed) as groups:
        chunks = load_chunks(opened, groups)
        engine = engine_of(opened, chunks, groups)
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

        def one_round(round_prompts: Sequence[tuple[int, Prompt]]) -> list[tuple[int, dict]] | None:
            numbered = [
                (slot * num_responses + r, prompt) for slot, prompt in round_prompts for r in range(num_responses)
            ]
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
    opened: OpenModel, chunks: Sequence[PolicyModel], scorer: Scorer, rollouts: Sequence[Rollout]
) -> list[np.ndarray]:
    """Return the last stage's log-probs on every rank of the replica: all of them run the chain and must agree."""
    log_probs = log_probs_by_slot(rollouts, chunks, scorer, opened)
    lengths = [len(rollout.response_token_ids) for rollout in rollouts]
    all_log_probs = None
    if log_probs:
        all_log_probs = torch.tensor(
            [value for rollout in rollouts for value in log_probs[rollout.slot]], dtype=torch.float64
        )
    shared_log_probs = from_last_stage(all_log_probs, (sum(lengths),), scorer.groups).numpy()
    return np.split(shared_log_probs, np.cumsum(lengths)[:-1])


def _chain_line(chain: Chain, num_responses: int, num_moves: int, opened: OpenModel) -> dict:
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
