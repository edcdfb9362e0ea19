"""The commands of a model: score, generate, evaluate, export.

Thin: they parse, validate, hand over. torch is imported inside them only, so `--help` is quick.
"""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_powerflow.cli.options import MODEL_HELP, Overrides, refuse_options, typed_command
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import UserError
from megatron_powerflow.parallel.initialize import prepare_imports
from megatron_powerflow.parallel.launch import read_launch


class PromptAs(StrEnum):
    """How a benchmark's question is put: the user message of the model's chat template, or bare text."""

    _value_: Literal["chat", "text"]
    chat = "chat"
    text = "text"


def score(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    data: Annotated[str, typer.Option(help="JSONL or parquet: a prompt and response or response_token_ids per line")],
    out: Annotated[Path, typer.Option(help="JSONL: id, log_probs, sequence_log_prob")],
    overrides: Overrides = None,
) -> None:
    """Log-probs of given responses, per token, by the scorer that training uses.

    Example: powerflow score --model models/SmolLM2-135M-Instruct --data rows.jsonl --out scored.jsonl
    """
    launch = read_launch()
    prepare_imports()
    from megatron_powerflow.commands.open_model import SCORE_KEYS, open_named
    from megatron_powerflow.commands.score import score_file

    opened = open_named(model, overrides or (), SCORE_KEYS, launch, data={"--data": [data]})
    score_file(opened, data, out, launch, make_console())


class Engine(StrEnum):
    """Who draws responses: this process, or the vLLM servers of rollout.vllm.urls."""

    megatron = "megatron"
    vllm = "vllm"


ENGINE_HELP = "who samples: this command, or vLLM servers: rollout.vllm.urls=[http://host:port]"


class Decoding(StrEnum):
    """How `generate` draws responses."""

    sample = "sample"
    power_sampling = "power_sampling"
    verbalized = "verbalized"


def generate(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    prompts: Annotated[str, typer.Option(help="JSONL or parquet, as for training; a file, or hf://OWNER/NAME/FILE")],
    out: Annotated[Path, typer.Option(help="JSONL: id, response_index, text, response_token_ids, log_probs, ...")],
    num_responses: Annotated[int, typer.Option(min=1, help="responses per prompt")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the most likely token")] = False,
    decoding: Annotated[
        Decoding, typer.Option(help="token by token; from p^alpha by Metropolis-Hastings; several in one JSON answer")
    ] = Decoding.sample,
    alpha: Annotated[float | None, typer.Option(help="power_sampling: power of the model (default 4)")] = None,
    blocks: Annotated[int | None, typer.Option(min=1, help="power_sampling: growing limits (default 16)")] = None,
    moves: Annotated[int | None, typer.Option(min=0, help="power_sampling: moves in each block (default 10)")] = None,
    target_words: Annotated[int | None, typer.Option(min=1, help="verbalized: length to ask for")] = None,
    engine: Annotated[Engine, typer.Option(help=ENGINE_HELP)] = Engine.megatron,
    overrides: Overrides = None,
) -> None:
    """Sample responses through the engine that training uses.

    Example: powerflow generate --model runs/local --prompts examples/prompts/mixed.jsonl --out answers.jsonl
    --num-responses 4 rollout.max_response_tokens=256
    """
    powers = {"--alpha": alpha, "--blocks": blocks, "--moves": moves}
    refuse_options(powers, decoding is not Decoding.power_sampling, f"--decoding {decoding.value}")
    refuse_options(
        {"--target-words": target_words}, decoding is not Decoding.verbalized, f"--decoding {decoding.value}"
    )
    refuse_options({"--greedy": greedy or None}, decoding is Decoding.power_sampling, "--decoding power_sampling")
    sampled = decoding is Decoding.sample
    refuse_options({"--engine": engine is Engine.vllm or None}, not sampled, f"--decoding {decoding.value}")
    if alpha is not None and not (0 < alpha < math.inf):
        raise UserError(f"--alpha {alpha}: a power is a number above 0")
    launch = read_launch()
    prepare_imports()
    from megatron_powerflow.commands.generate import generate_file
    from megatron_powerflow.commands.open_model import GENERATE_KEYS, SERVER_KEYS, open_named
    from megatron_powerflow.commands.power_sampling import POWER_SAMPLING_KEYS, power_sample_file
    from megatron_powerflow.commands.verbalized import VerbalizedSampling, verbalize_file
    from megatron_powerflow.rollout.power_sampling import PowerSampling

    console = make_console()
    allowed = POWER_SAMPLING_KEYS if decoding is Decoding.power_sampling else GENERATE_KEYS
    allowed = (*allowed, *SERVER_KEYS) if engine is Engine.vllm else allowed
    opened = open_named(model, overrides or (), allowed, launch, engine=engine.value, data={"--prompts": [prompts]})
    if decoding is Decoding.power_sampling:
        recipe = PowerSampling(
            alpha=4.0 if alpha is None else alpha,
            num_blocks=16 if blocks is None else blocks,
            num_moves=10 if moves is None else moves,
        )
        power_sample_file(opened, prompts, out, num_responses, recipe, launch, console)
    elif decoding is Decoding.verbalized:
        temperature = 0.0 if greedy else opened.config.rollout.temperature
        request = VerbalizedSampling(num_responses, target_words, temperature)
        verbalize_file(opened, prompts, out, request, launch, console)
    else:
        generate_file(opened, prompts, out, num_responses, greedy, launch, console)


def evaluate(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    data: Annotated[list[str], typer.Option(help="JSONL, JSON, CSV, parquet or a benchmark's hub name; repeatable")],
    out: Annotated[Path, typer.Option(help="folder for responses.jsonl and evaluation.json; continued if begun")],
    num_responses: Annotated[int, typer.Option(min=1, help="responses per question")] = 1,
    format: Annotated[str | None, typer.Option(help="of the data; default: by its columns")] = None,
    suffix: Annotated[
        str | None, typer.Option(help="appended to a benchmark's questions; default: ask for a box")
    ] = None,
    prompt_as: Annotated[PromptAs | None, typer.Option(help="a benchmark's questions; default: chat")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the most likely token")] = False,
    reference: Annotated[bool, typer.Option("--reference", help="a run's base model, with the run's settings")] = False,
    diversity: Annotated[bool, typer.Option("--diversity", help="distinct-n, self-BLEU, semantic distance")] = False,
    judge_url: Annotated[str | None, typer.Option(help="http(s)://host/v1 of an OpenAI-compatible judge")] = None,
    judge_model: Annotated[str | None, typer.Option(help="the judge's name there")] = None,
    judge_key_file: Annotated[Path | None, typer.Option(help="file that holds the judge's API key")] = None,
    engine: Annotated[Engine, typer.Option(help=ENGINE_HELP)] = Engine.megatron,
    overrides: Overrides = None,
) -> None:
    """Answer questions and count the right answers: avg, pass@k, majority, lengths; continued when it was killed.

    Example: powerflow evaluate --model runs/local --data HuggingFaceH4/MATH-500 --data aime2025-I.jsonl --out
    runs/local/evaluation --num-responses 16 rollout.temperature=1.0
    """
    launch = read_launch()
    prepare_imports()
    from megatron_powerflow.commands.open_model import GENERATE_KEYS, SERVER_KEYS, open_named
    from megatron_powerflow.evaluation.evaluate import EvaluationRequest
    from megatron_powerflow.evaluation.evaluate import evaluate as run
    from megatron_powerflow.evaluation.judge import make_judge

    request = EvaluationRequest(
        data=tuple(data),
        num_responses=num_responses,
        greedy=greedy,
        format=format,
        suffix=suffix,
        prompt_as=None if prompt_as is None else prompt_as.value,
        diversity=diversity,
        judge=make_judge(judge_url, judge_model, judge_key_file),
    )
    allowed = (*GENERATE_KEYS, *SERVER_KEYS) if engine is Engine.vllm else GENERATE_KEYS
    opened = open_named(
        model,
        overrides or (),
        allowed,
        launch,
        reference=reference,
        engine=engine.value,
        data={"--data": request.data},
    )
    run(opened, request, out, launch, make_console(), command=typed_command())


def export(
    checkpoint: Annotated[Path, typer.Argument(help="run folder (its latest), checkpoint or converted one")],
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write")],
    push_to_hub: Annotated[
        str | None, typer.Option(help="OWNER/NAME: push it there when it is written", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="make the new repository a private one")] = False,
    overrides: Overrides = None,
) -> None:
    """Write a training checkpoint as a plain Hugging Face folder, through the loaded model, spread over any layout.

    Replaces an older export, and nothing else.

    tools/convert_megatron_to_hf.py writes the same tensors without building the model: in little memory, without GPUs,
    from any step, with a proof (--verify).

    --push-to-hub writes a new or empty repository, or one that an export was pushed to. A push that fails leaves the
    folder, and says how to push it later.

    Example: powerflow export runs/local --out exported --push-to-hub me/my-model --private
    """
    refuse_options({"--private": private or None}, push_to_hub is None, "no --push-to-hub")
    launch = read_launch()
    prepare_imports()
    from megatron_powerflow.commands.export import export_file
    from megatron_powerflow.commands.open_model import COMMON_KEYS, open_model
    from megatron_powerflow.hub.push import check_push, push
    from megatron_powerflow.targets import export_target

    opened = open_model(checkpoint, overrides or (), COMMON_KEYS, launch.world_size)
    asked = check_push(push_to_hub, private, export_target(out), launch) if push_to_hub is not None else None
    export_file(opened, out, launch, make_console(), command=typed_command())
    if asked is not None and launch.is_main:
        print(f"pushing {out} to {asked.repository}", flush=True)
        print(f"pushed {push(out, asked)}")
