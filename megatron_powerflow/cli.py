"""The command line: powerflow train|check|config|recipes|prepare|score|generate|evaluate|export|report|stop|outcome|...

Thin: parses, validates, hands over. torch is imported inside the commands only, so `--help` and `check` are quick
and an impossible run never reaches it.
"""

from __future__ import annotations

import math
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_powerflow import __version__
from megatron_powerflow.children import end_spawned_with_parent
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.errors import (
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    EXIT_USER_ERROR,
    Interrupted,
    RequeueRequested,
    UserError,
)
from megatron_powerflow.parallel.initialize import (
    ALONE,
    command_line,
    environment_secrets,
    prepare_imports,
    read_launch,
)
from megatron_powerflow.redaction import redacted

if TYPE_CHECKING:
    from megatron_powerflow.run_end import RunEnd

end_spawned_with_parent()  # in a process that Megatron starts for its checkpoints
app = typer.Typer(
    name="powerflow",
    help="PowerFlow on Megatron-Core: sharpen or flatten a language model without labels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
MODEL_HELP = "HF folder, run folder, checkpoint or converted one, or OWNER/NAME[@REVISION] on the hub"
A_BENCHMARK = "HuggingFaceH4/MATH-500"


def _complete_key(incomplete: str) -> list[str]:
    """For the shell's Tab: the keys of a config that begin so."""
    from megatron_powerflow.config_help import keys

    return [f"{key.name}=" for key in keys() if key.name.startswith(incomplete)]


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="section.key=value, as many as wanted; null takes a value away",
        show_default=False,
        autocompletion=_complete_key,
    ),
]


def _say_version(asked: bool) -> None:
    if asked:
        print(f"powerflow {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="say the version and exit", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """PowerFlow on Megatron-Core: sharpen or flatten a language model without labels."""


class PromptAs(StrEnum):
    """How a benchmark's question is put: the user message of the model's chat template, or bare text."""

    _value_: Literal["chat", "text"]
    chat = "chat"
    text = "text"


OverriddenKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--override-resume",
        metavar="KEY",
        help="let a run go on although this key is not as it was; repeatable",
        show_default=False,
    ),
]


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    override_resume: OverriddenKeys = None,
) -> None:
    """Train: alone, under torchrun, or under srun. Started again, the same command continues.

    Example: torchrun --nproc-per-node 2 -m megatron_powerflow.cli train examples/configs/local.yaml parallel.pp=2
    """
    from megatron_powerflow.run_end import RunEnd

    with RunEnd(read_launch()) as end:
        _train(config, overrides or (), override_resume or (), end)


def _train(config: Path, overrides: Sequence[str], overridden: Sequence[str], end: RunEnd) -> None:
    launch = end.launch
    settings = load_config(config, overrides)
    end.of_run(Path(settings.run.output_dir))
    from megatron_powerflow.training.fetched import fetch_inputs
    from megatron_powerflow.training.plan import make_plan

    located = fetch_inputs(settings, launch, world_size=launch.world_size, overridden=overridden)
    plan = make_plan(settings, launch.world_size, located=located, overridden=overridden)
    console = make_console()
    if launch.is_main:
        from megatron_powerflow.training.plan import describe

        console.print(describe(plan))
    prepare_imports()
    from megatron_powerflow.train import train as run

    run(plan, launch, console, command=_command(), end=end)
    if launch.is_main:
        console.print(_done(plan.run_folder))


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="YAML file")],
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(help="processes; default: one replica, tp * cp * pp")] = None,
    override_resume: OverriddenKeys = None,
) -> None:
    """Say everything that is wrong with a run, without GPUs or processes; or print its layout.

    Of a model on the hub it fetches config and tokenizer only, and says what it could not look at.

    Example: powerflow check examples/configs/local.yaml parallel.tp=3 --world-size 6
    """
    settings = load_config(config, overrides or ())
    from megatron_powerflow.training.fetched import fetch_inputs
    from megatron_powerflow.training.plan import describe, make_plan

    parallel = settings.parallel
    world_size = world_size or parallel.tp * parallel.cp * parallel.pp
    overridden = override_resume or ()
    located = fetch_inputs(settings, read_launch(), world_size=world_size, weights=False, overridden=overridden)
    plan = make_plan(settings, world_size, weights=False, located=located, overridden=overridden)
    from megatron_powerflow.run_folder import holder_of

    if held := holder_of(plan.run_folder):
        raise UserError(held)
    make_console().print(describe(plan))


@app.command(name="config")
def explain_config(
    key: Annotated[str | None, typer.Argument(help="a key or a section; default: all", show_default=False)] = None,
) -> None:
    """Every key of a config: type, default, meaning, and which objectives know it.

    Example: powerflow config objective.alpha
    """
    from megatron_powerflow.config_help import explain, keys

    for item in explain(key) if key else keys():
        default = f", default {item.default}" if item.default else ""
        presets = f" [only with objective.preset={', '.join(item.presets)}]" if item.presets else ""
        print(f"{item.name}  ({item.type}{default})\n    {item.meaning}{presets}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="one of the list; without it the list", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="YAML file to write", show_default=False)] = None,
) -> None:
    """The recipes that come with the program: list them, or copy one to change it.

    Example: powerflow recipes reasoning_base --out my.yaml
    """
    from megatron_powerflow.recipes import copy, names

    if name is None:
        print(*(f"{recipe:24}{title}" for recipe, title in names().items()), sep="\n")
        return
    if out is None:
        raise UserError(f"--out: name the file that {name} is to be copied to")
    copy(name, out)
    print(f"wrote {out}; powerflow check {out} model.hf_path=...")


@app.command()
def env() -> None:
    """Versions, devices and what is missing on this machine: lines to paste into an issue.

    Example: powerflow env
    """
    from megatron_powerflow.environment import describe

    print(*describe(), sep="\n")


@app.command()
def prepare(
    data: Annotated[
        list[str],
        typer.Argument(
            help="numina, with files of its kind or else the published ones from the hub; creative, with the three "
            "options below; or files and hub names alone, read like numina's",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="prompts to write: .parquet; the held-out ones and a report beside it")],
    against: Annotated[
        list[str] | None, typer.Option(help="evaluation sets that no prompt may be of: files or hub names; repeatable")
    ] = None,
    held_out: Annotated[float, typer.Option(min=0, max=0.5, help="share kept apart for evaluation")] = 0.01,
    max_answer: Annotated[int, typer.Option(min=1, help="characters of the longest answer")] = 60,
    max_solution: Annotated[int, typer.Option(min=1, help="characters of the longest solution")] = 9000,
    poems: Annotated[list[str] | None, typer.Option(help="creative: files of poems, to be continued")] = None,
    stories: Annotated[
        list[str] | None, typer.Option(help="creative: files of stories, whose beginnings count")
    ] = None,
    jokes: Annotated[list[str] | None, typer.Option(help="creative: files of jokes, to be finished")] = None,
    each: Annotated[int, typer.Option(min=1, help="creative: prompts of each of the three at most")] = 100,
) -> None:
    """Make prompts of published files: what has no short answer, is too long, leaks or comes twice falls out.

    Example: powerflow prepare numina --out prompts.parquet --against HuggingFaceH4/MATH-500
    """
    from megatron_powerflow.hub.fetch import locate
    from megatron_powerflow.hub.located import RequestedName
    from megatron_powerflow.prepare import lines_of, named_files
    from megatron_powerflow.prepare import prepare as run

    files = named_files(data, {"poem": poems or (), "story": stories or (), "joke": jokes or ()})
    wanted = [RequestedName("dataset", name, "DATA") for names in files.values() for name in names]
    wanted += [RequestedName("dataset", name, "--against") for name in against or ()]
    report = run(
        files,
        out,
        against=against or (),
        held_out=held_out,
        each=each,
        located=locate(wanted, ALONE),
        console=make_console(),
        max_answer=max_answer,
        max_solution=max_solution,
    )
    print(*lines_of(report), sep="\n")


@app.command()
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


class Decoding(StrEnum):
    """How `generate` draws responses."""

    sample = "sample"
    power_sampling = "power_sampling"
    verbalized = "verbalized"


@app.command()
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
    overrides: Overrides = None,
) -> None:
    """Sample responses through the engine that training uses.

    Example: powerflow generate --model runs/local --prompts examples/prompts/mixed.jsonl --out answers.jsonl
    --num-responses 4 rollout.max_response_tokens=256
    """
    powers = {"--alpha": alpha, "--blocks": blocks, "--moves": moves}
    _refuse_options(powers, decoding is not Decoding.power_sampling, f"--decoding {decoding.value}")
    _refuse_options(
        {"--target-words": target_words}, decoding is not Decoding.verbalized, f"--decoding {decoding.value}"
    )
    _refuse_options({"--greedy": greedy or None}, decoding is Decoding.power_sampling, "--decoding power_sampling")
    if alpha is not None and not (0 < alpha < math.inf):
        raise UserError(f"--alpha {alpha}: a power is a number above 0")
    launch = read_launch()
    prepare_imports()
    from megatron_powerflow.commands.generate import generate_file
    from megatron_powerflow.commands.open_model import GENERATE_KEYS, open_named
    from megatron_powerflow.commands.power_sampling import POWER_SAMPLING_KEYS, power_sample_file
    from megatron_powerflow.commands.verbalized import VerbalizedSampling, verbalize_file
    from megatron_powerflow.rollout.power_sampling import PowerSampling

    console = make_console()
    allowed = POWER_SAMPLING_KEYS if decoding is Decoding.power_sampling else GENERATE_KEYS
    opened = open_named(model, overrides or (), allowed, launch, data={"--prompts": [prompts]})
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


@app.command()
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
    overrides: Overrides = None,
) -> None:
    """Answer questions and count the right answers: avg, pass@k, majority, lengths; continued when it was killed.

    Example: powerflow evaluate --model runs/local --data HuggingFaceH4/MATH-500 --data aime2025-I.jsonl --out
    runs/local/evaluation --num-responses 16 rollout.temperature=1.0
    """
    launch = read_launch()
    prepare_imports()
    from megatron_powerflow.commands.open_model import GENERATE_KEYS, open_named
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
    opened = open_named(
        model, overrides or (), GENERATE_KEYS, launch, reference=reference, data={"--data": request.data}
    )
    run(opened, request, out, launch, make_console(), command=_command())


@app.command()
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
    _refuse_options({"--private": private or None}, push_to_hub is None, "no --push-to-hub")
    launch = read_launch()
    prepare_imports()
    from megatron_powerflow.commands.export import export_file
    from megatron_powerflow.commands.open_model import COMMON_KEYS, open_model
    from megatron_powerflow.hub.push import check_push, push
    from megatron_powerflow.targets import export_target

    opened = open_model(checkpoint, overrides or (), COMMON_KEYS, launch.world_size)
    asked = check_push(push_to_hub, private, export_target(out), launch) if push_to_hub is not None else None
    export_file(opened, out, launch, make_console(), command=_command())
    if asked is not None and launch.is_main:
        print(f"pushing {out} to {asked.repository}", flush=True)
        print(f"pushed {push(out, asked)}")


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    out: Annotated[Path | None, typer.Option(help="PNG; default: curves.png in the first run")] = None,
) -> None:
    """Draw the training curves of one or more runs.

    Example: powerflow curves runs/local
    """
    from megatron_powerflow.report.curves import CURVES_NAME, draw_curves

    notes: list[str] = []
    print(draw_curves(runs, out or runs[0] / CURVES_NAME, notes))
    _say_notices(notes)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders, or folders with an evaluation.json")],
    out: Annotated[Path, typer.Option(help="folder for index.html and its pictures")],
) -> None:
    """Compare runs on one page: tables and pictures, seeds of one configuration taken together.

    Example: powerflow report runs/la_tb_s0 runs/la_tb_s1 runs/rl_token_s0 evaluations/base --out report
    """
    from megatron_powerflow.report.page import build_report

    command = command_line("powerflow", "report", *map(str, runs), "--out", str(out))
    print(build_report(runs, out, command))


@app.command()
def goodput(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    as_json: Annotated[bool, typer.Option("--json", help="numbers for programs, on stdout")] = False,
) -> None:
    """Where the time of a run went, over all its starts: productive, lost, saving, loading, waiting; what ended them.

    Example: powerflow goodput runs/local
    """
    import json

    from megatron_powerflow.report.goodput_table import goodput_json, goodput_table, read_all
    from megatron_powerflow.run_folder import is_running

    notes: list[str] = []
    found = read_all({run: is_running(run) for run in runs}, notes)
    if as_json:
        print(json.dumps({str(run): goodput_json(goodput) for run, goodput in found.items()}, indent=2))
    else:
        for run, goodput in found.items():
            make_console().print(goodput_table(run, goodput))
    _say_notices(notes)


@app.command()
def stop(config: Annotated[Path, typer.Argument(help="YAML file")], overrides: Overrides = None) -> None:
    """Ask a running run to save at the end of its step and to exit with 75. The same command continues it.

    Example: powerflow stop examples/configs/local.yaml run.output_dir=runs/local
    """
    from megatron_powerflow.checkpoint.folder import CONFIG_NAME, LOCK_NAME, STOP_NAME

    folder = Path(load_config(config, overrides or ()).run.output_dir)
    if not (folder / CONFIG_NAME).is_file() and not (folder / LOCK_NAME).is_file():
        raise UserError(f"{folder}: no run has started there")
    (folder / STOP_NAME).touch()
    print(f"{folder} will stop at the end of its step")


@app.command()
def outcome(
    run: Annotated[Path, typer.Argument(help="run folder, or the YAML file of `train`")],
    overrides: Overrides = None,
    forget: Annotated[bool, typer.Option("--forget", help="instead: remove it, before a new start")] = False,
) -> None:
    """How a run's last start ended, with that exit code: also where torchrun made it 1. Scripts requeue on 75.

    Example: powerflow outcome runs/local
    """
    from megatron_powerflow.outcome import EXIT_FAILED, read_outcome, remove_outcome
    from megatron_powerflow.run_folder import holder_of

    folder = run if run.is_dir() else Path(load_config(run, overrides or ()).run.output_dir)
    if forget:
        if held := holder_of(folder):
            raise UserError(held)
        return remove_outcome(folder)
    found = read_outcome(folder)
    if found is None:
        print(f"{folder}: no start has left its outcome there")
        raise typer.Exit(EXIT_FAILED)
    print(f"{folder}: {found.describe()}")
    if found.exit_code is None:
        print(f"{holder_of(folder) or 'nobody holds the folder: that run was killed'}")
    raise typer.Exit(EXIT_FAILED if found.exit_code is None else found.exit_code)


def _done(run: Path) -> str:
    """What a finished run has left, and the commands that go on from there: each can be typed as it stands."""
    from megatron_powerflow.checkpoint.folder import EXPORT_NAME, latest_checkpoint

    lines = [f"done: {run}, latest checkpoint {latest_checkpoint(run)}"]
    if (run / EXPORT_NAME).is_dir():
        lines.append(f"  serve it     {shlex.join(['vllm', 'serve', str(run / EXPORT_NAME)])}")
    measure = ["powerflow", "evaluate", "--model", str(run), "--data", A_BENCHMARK, "--out", str(run / "evaluation")]
    look = ["powerflow", "report", str(run), "--out", str(run / "report")]
    return "\n".join([*lines, f"  measure it   {shlex.join(measure)}", f"  look at it   {shlex.join(look)}"])


def _say_notices(notes: list[str]) -> None:
    """What was left out of files that were read, to stderr."""
    for note in notes:
        print(f"notice: {note}", file=sys.stderr)


def _refuse_options(options: Mapping[str, object], unused: bool, why: str) -> None:
    """UserError for the options that were given where they change nothing."""
    given = [name for name, value in options.items() if value is not None]
    if unused and given:
        raise UserError([f"{name} has no effect with {why}; remove it" for name in given])


def _command() -> str:
    """Write the command of this process for the folders that it fills: powerflow, or the module a launcher runs."""
    by_name = Path(sys.argv[0]).name == "powerflow"
    return command_line(*(["powerflow"] if by_name else ["python", "-m", "megatron_powerflow.cli"]), *sys.argv[1:])


def main() -> None:
    """Entry point of the console script."""
    exit_codes(app)


def exit_codes(program: Callable[[], None]) -> None:
    """Run a command line. Exit codes: 0, 2 the user's mistake, 75 start me again, else a bug with its traceback."""
    try:
        program()
    except UserError as error:
        _leave(EXIT_USER_ERROR, [f"error: {violation}" for violation in error.violations])
    except RequeueRequested as request:
        _leave(EXIT_REQUEUE, [str(request)])
    except Interrupted as request:
        _leave(EXIT_INTERRUPTED, [str(request)])
    except KeyboardInterrupt:
        _leave(EXIT_INTERRUPTED, ["interrupted"])
    except Exception:
        if read_launch().world_size == 1:
            raise
        from megatron_powerflow.run_end import leave

        traceback.print_exc()
        leave(1)


def _leave(code: int, lines: list[str]) -> None:
    """Exit on every rank alike; one of them says why."""
    launch = read_launch()
    if launch.is_main:
        secrets = environment_secrets()
        print(*(redacted(line, secrets) for line in lines), sep="\n", file=sys.stderr)
    if launch.world_size > 1:
        from megatron_powerflow.run_end import leave

        leave(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
