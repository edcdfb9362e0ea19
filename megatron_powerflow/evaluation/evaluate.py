"""How well does a model answer questions? `powerflow evaluate`, start to end.

    questions -> prompts -> rounds over the data-parallel ranks -> responses.jsonl -> evaluation.json

The engine is training's own, under any layout, from a checkpoint or a Hugging Face folder. The random numbers that
sample a response follow from (seed, index of its question, index of the response), so a layout or an interruption
changes nothing. Diversity and the judge come last, when the model is off the device.

Left out: the rounds themselves (`answering.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_powerflow.commands.generate import check_room
from megatron_powerflow.commands.open_model import OpenModel, say_notices
from megatron_powerflow.commands.rounds import progress_bar
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.answering import answer_questions, tokenize
from megatron_powerflow.evaluation.diversity import check_packages, load_encoder, measure_diversity
from megatron_powerflow.evaluation.judge import JudgeServer
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
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.owner import Owner


@dataclass(frozen=True)
class EvaluationRequest:
    """Holds the options of an evaluation, all but the model.

    `load_questions` explains format, suffix and prompt_as.
    """

    data: tuple[str, ...]
    num_responses: int
    greedy: bool = False
    format: str | None = None
    suffix: str | None = None
    prompt_as: PromptAs | None = None
    diversity: bool = False
    judge: JudgeServer | None = None


def evaluate(
    opened: OpenModel, request: EvaluationRequest, out: Path, launch: Launch, console: Console, *, command: str = ""
) -> None:
    """Evaluates the model and leaves responses.jsonl and evaluation.json in `out`.

    Collective over all ranks; the main one writes and prints. command: the command line, for the record. Raises
    UserError where the request, its data or the folder cannot be used.
    """
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
    tokenized = tokenize(loaded.questions, opened)
    if len(tokenized) < len(loaded.questions):
        dropped = len(loaded.questions) - len(tokenized)
        say(f"{dropped} questions over rollout.max_prompt_tokens dropped")
    settings = describe_settings(opened, request, [question for _, question, _ in tokenized])
    check_settings(out, settings)
    with Owner(out, out / LOCK_NAME, "powerflow evaluate") as owner:
        try:
            answer_questions(opened, tokenized, settings, out, owner, launch, console)
        except UserError:
            if owner.holds():
                remove_unanswered(out)
            raise
        if launch.is_main:
            questions = [question for _, question, _ in tokenized]
            report(request, questions, settings, out, console, command, opened.located.revisions)


def _check(opened: OpenModel, request: EvaluationRequest) -> None:
    """Raises UserError for what can be known to be wrong before any file is read."""
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


def describe_settings(opened: OpenModel, request: EvaluationRequest, questions: Sequence[Question]) -> Line:
    """Returns everything that the responses depend on, except the layout: the content of settings.json."""
    config = opened.config
    contents = [(q.task, q.id, q.prompt, q.answer, q.tolerance) for q in questions]
    return {
        "model": str((opened.checkpoint or opened.hf_folder).resolve()),
        "precision": config.precision.model_dump(exclude_none=True),
        "data": ", ".join(request.data),
        "num_questions": len(questions),
        "questions_sha256": hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest(),
        "num_responses": request.num_responses,
        "temperature": 0.0 if request.greedy else config.rollout.temperature,
        "max_response_tokens": config.rollout.max_response_tokens,
        "seed": config.run.seed,
    }


def report(
    request: EvaluationRequest,
    questions: Sequence[Question],
    settings: Line,
    out: Path,
    console: Console,
    command: str,
    revisions: Mapping[str, str],
) -> None:
    """Writes evaluation.json and prints the table, from responses.jsonl. Called on the main rank only.

    revisions: name on the hub -> commit.
    """
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
