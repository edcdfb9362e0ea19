"""How does a model answer a file of prompts? `powerflow generate`, with the engine of training.

Left out: the training-free rivals (`power_sampling.py`, `verbalized.py`), how the lines come into their file
(`rounds.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_powerflow.commands.open_model import OpenModel, sampling_engine, say_notices
from megatron_powerflow.commands.rounds import BY_GENERATE, ROUND_ROWS, output_refusals, write_rounds
from megatron_powerflow.data.prompts import Rewrite, load_prompts
from megatron_powerflow.data.tokenizer import Tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.records import Prompt, Purpose, Rollout, SamplingParams
from megatron_powerflow.rollout.sampling_params import sampling_params
from megatron_powerflow.targets import require
from megatron_powerflow.training.plan import stop_token_ids_of


def generate_file(
    opened: OpenModel,
    prompts: str | Path,
    out: Path,
    num_responses: int,
    greedy: bool,
    launch: Launch,
    console: Console,
) -> None:
    """Answer a file of prompts and write one JSON line per response.

    A line holds id, response_index, text, response_token_ids, log_probs (nats) and finish_reason. Raises UserError
    when `out` may not be written, or as `load_generation_prompts` does.
    """
    require(output_refusals(out, *BY_GENERATE))
    if greedy and num_responses > 1 and opened.config.rollout.engine == "vllm":
        raise UserError(f"--greedy with --num-responses {num_responses}: all would be one response; vLLM refuses it")
    loaded_prompts = load_generation_prompts(opened, prompts, launch, console)
    temperature = 0.0 if greedy else opened.config.rollout.temperature
    sampling = sampling_of_answers(opened, responses_per_prompt=num_responses, temperature=temperature)
    with (
        initialized(opened.layout, launch, seed=opened.config.run.seed) as groups,
        sampling_engine(opened, groups, loaded_prompts, out, console) as engine,
    ):
        reports = groups.pp_rank == 0 and groups.tp_rank == 0

        def one_round(round_prompts: Sequence[tuple[int, Prompt]]) -> list[tuple[int, dict]] | None:
            rollouts = engine.generate(round_prompts, sampling)
            return (
                [(rollout.slot, response_line(rollout, opened.tokenizer)) for rollout in rollouts] if reports else None
            )

        per_round = prompts_per_round(opened, num_responses)
        write_rounds(list(enumerate(loaded_prompts)), one_round, per_round, out, groups, console, "powerflow generate")


def load_generation_prompts(
    opened: OpenModel, name: str | Path, launch: Launch, console: Console, rewrite: Rewrite | None = None
) -> tuple[Prompt, ...]:
    """Load the prompts to answer. name: a file, or data on the hub; rewrite: changes each row first.

    Raises UserError where a row is bad, or the model has no room for the longest prompt and response.
    """
    say_notices(opened, launch, console)
    check_room(opened)
    rollout = opened.config.rollout
    prompts = load_prompts(
        opened.located.files(name),
        opened.tokenizer,
        vocab_size=opened.architecture.vocab_size,
        max_prompt_tokens=rollout.max_prompt_tokens,
        too_long=opened.config.prompts.too_long,
        rewrite=rewrite,
    )
    if prompts.num_too_long and launch.is_main:
        console.print(f"{prompts.num_too_long} prompts over rollout.max_prompt_tokens dropped")
    return prompts.prompts


def check_room(opened: OpenModel) -> None:
    """Check that the model has positions for the longest prompt and response. Raises UserError when not."""
    rollout = opened.config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if longest > opened.architecture.max_positions:
        raise UserError(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} is over the model's "
            f"{opened.architecture.positions_field}={opened.architecture.max_positions}; lower one of them"
        )


def sampling_of_answers(opened: OpenModel, *, responses_per_prompt: int, temperature: float) -> SamplingParams:
    """Return how a command's answers are drawn: by the config, with uniforms of their own."""
    return sampling_params(
        opened.config,
        stop_token_ids_of(opened.config, opened.hf_folder, opened.tokenizer, opened.architecture),
        purpose=Purpose.ANSWERS,
        responses_per_prompt=responses_per_prompt,
        temperature=temperature,
    )


def prompts_per_round(opened: OpenModel, responses_per_prompt: int) -> int:
    """Return how many prompts a data-parallel rank answers between two writes."""
    return max(1, max(ROUND_ROWS, opened.config.rollout.max_concurrent_rows) // responses_per_prompt)


def response_line(rollout: Rollout, tokenizer: Tokenizer) -> dict:
    """Return the line that the output file gets for a rollout."""
    return {
        "id": rollout.prompt.id,
        "response_index": rollout.response_index,
        "text": tokenizer.decode(rollout.response_token_ids),
        "response_token_ids": list(rollout.response_token_ids),
        "log_probs": list(rollout.rollout_log_probs),
        "finish_reason": rollout.finish_reason,
    }
