"""How well does a model answer questions? `powerflow evaluate`, start to end.

    questions -> prompts -> rounds over the data-parallel ranks -> responses.jsonl -> evaluation.json

The engine is training's own, under any layout, from a checkpoint or a Hugging Face folder. The uniforms that sample a
response follow from (seed, place of its question, response), so a layout or an interruption changes nothing.

Left out: the rounds themselves (`answering.py`). Diversity and the judge come when the model is off the device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_powerflow.commands.generate import check_room
from megatron_powerflow.commands.open_model import Opened, say_notices
from megatron_powerflow.commands.rounds import progress_bar
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.answering import answer_questions, tokenize
from megatron_powerflow.evaluation.diversity import check_packages, load_encoder, measure_diversity
from megatron_powerflow.evaluation.judge import Judge
from megatron_powerflow.evaluation.judgements import check_judgeable, judge_responses
from megatron_powerflow.evaluation.questions import PromptAs, Question, load_questions
from megatron_powerflow.evaluation.responses import (
    LOCK_NAME,
    Line,
    by_question,
    check_settings,
    read_responses,
    remove_unanswered,
)
from megatron_powerflow.evaluation.results import describe_results, results_table, table_title, write_results
from megatron_powerflow.parallel.initialize import Launch
from megatron_powerflow.parallel.owner import Owner


@dataclass(frozen=True)
class Request:
    """What is asked of an evaluation, beside the model. See `load_questions` for format, suffix and prompt_as."""

    data: tuple[str, ...]
    num_responses: int
    greedy: bool = False
    format: str | None = None
    suffix: str | None = None
    prompt_as: PromptAs | None = None
    diversity: bool = False
    judge: Judge | None = None


def evaluate(
    opened: Opened, request: Request, out: Path, launch: Launch, console: Console, *, command: str = ""
) -> None:
    """Leave responses.jsonl and evaluation.json in `out`. Collective over all ranks; the main one writes and prints."""
    say = console.print if launch.is_main else lambda *_, **__: None
    say_notices(opened, launch, console)
    _check(opened, request)
    loaded = load_questions(
        request.data,
        format=request.format,
        suffix=request.suffix,
        prompt_as=request.prompt_as,
        located=opened.located,
    )
    if loaded.num_left_out:
        say(f"{loaded.num_left_out} rows left out: proofs, pictures, solutions without a box")
    if request.judge is not None:
        check_judgeable(loaded.questions, request.num_responses)
    asked = tokenize(loaded.questions, opened)
    if len(asked) < len(loaded.questions):
        dropped = len(loaded.questions) - len(asked)
        say(f"{dropped} questions over rollout.max_prompt_tokens dropped")
    settings = describe_settings(opened, request, [question for _, question, _ in asked])
    check_settings(out, settings)
    with Owner(out, out / LOCK_NAME, "powerflow evaluate") as owner:
        try:
            answer_questions(opened, asked, settings, out, owner, launch, console)
        except UserError:
            if owner.holds():
                remove_unanswered(out)
            raise
        if launch.is_main:
            questions = [question for _, question, _ in asked]
            report(request, questions, settings, out, console, command, opened.located.revisions)


def _check(opened: Opened, request: Request) -> None:
    """What can be known to be wrong before anything is read."""
    check_room(opened)
    violations = []
    if request.greedy and request.num_responses > 1:
        violations.append(f"--greedy with --num-responses {request.num_responses}: all would be equal; ask for 1")
    if request.diversity and request.num_responses == 1:
        violations.append("--diversity compares the responses to one prompt; ask for --num-responses 2 or more")
    if violations:
        raise UserError(violations)
    if request.diversity:
        check_packages()


def describe_settings(opened: Opened, request: Request, questions: Sequence[Question]) -> Line:
    """Everything that the responses depend on, but the layout."""
    config = opened.config
    asked = [(q.task, q.id, q.prompt, q.answer, q.tolerance) for q in questions]
    return {
        "model": str((opened.checkpoint or opened.hf_folder).resolve()),
        "precision": config.precision.model_dump(exclude_none=True),
        "data": ", ".join(request.data),
        "num_questions": len(questions),
        "questions_sha256": hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(),
        "num_responses": request.num_responses,
        "temperature": 0.0 if request.greedy else config.rollout.temperature,
        "max_response_tokens": config.rollout.max_response_tokens,
        "seed": config.run.seed,
    }


def report(
    request: Request,
    questions: Sequence[Question],
    settings: Line,
    out: Path,
    console: Console,
    command: str,
    revisions: Mapping[str, str],
) -> None:
    """evaluation.json and the table, from responses.jsonl. The main rank's. revisions: name on the hub -> commit."""
    lines = read_responses(out)
    diversity: dict = {}
    if request.diversity:
        groups = [[line["text"] for line in responses] for responses in by_question(lines).values()]
        with progress_bar(console, True) as bar:
            task = bar.add_task("diversity", total=len(groups))
            diversity = measure_diversity(groups, load_encoder(), lambda: bar.advance(task))
    results = describe_results(settings, lines, diversity, command, revisions)
    path = write_results(out, results)
    console.print(table_title(results))
    console.print(results_table(results))
    if request.judge is not None:
        results["judge"] = judge_responses(request.judge, questions, by_question(lines), out, console)
        write_results(out, results)
    for title, values in {"diversity": diversity, **results.get("judge", {})}.items():
        if values:
            shown = ", ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in values.items())
            console.print(f"{title}: {shown}")
    console.print(f"wrote {path}")
