"""Which questions is a model to be asked? Data files in, questions with gold answers out.

The format of a file is detected by its columns or named by the user. Every bad row is reported by its location,
FILE:NUMBER, before anything starts.

Left out: the formats themselves (`readers.py`), tokens (`answering.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_powerflow.data.prompt_rows import PROMPT_COLUMNS, QUESTION_COLUMNS, answer_of, prompt_of, task_of
from megatron_powerflow.data.prompts import first_violations, text_field
from megatron_powerflow.data.rows import Row, read_file
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.readers import BENCHMARKS
from megatron_powerflow.hub.located import NO_DOWNLOADS, LocalPaths

PROMPTS_FORMAT = "prompts"  # files as training reads them, taken as they are
GENERIC = "math"  # its task is called as the file is
COLUMNS_OF_ROWS = 100  # rows whose columns tell the format: a row may leave some out
FORMATS = (*BENCHMARKS, PROMPTS_FORMAT)
PromptAs = Literal["chat", "text"]


@dataclass(frozen=True, slots=True)
class Question:
    """Holds one question of an evaluation; (task, id) is unique.

    location: FILE:NUMBER of its row, for messages.
    """

    id: str
    task: str
    prompt: Row  # one of `prompt`, `messages`, `prompt_token_ids`, as data/prompts.py reads it
    answer: str | None  # None: there is nothing to compare with
    location: str
    tolerance: float | None = None


@dataclass(frozen=True)
class LoadedQuestions:
    """Holds the questions of all data files.

    num_left_out: how many rows ask for a proof or a picture, or have a solution without a box.
    """

    questions: tuple[Question, ...]
    num_left_out: int


def load_questions(
    data: Sequence[str],
    *,
    format: str | None = None,
    suffix: str | None = None,
    prompt_as: PromptAs | None = None,
    located: LocalPaths = NO_DOWNLOADS,
) -> LoadedQuestions:
    """Reads the questions of data files, in their order. Raises UserError with every bad row.

    located: where the files of names on the hub are. format: one of FORMATS for all of `data`; None detects the format
    of each file. suffix: appended to a benchmark's questions; None stands for the format's own, "" for none. prompt_as:
    "chat" (also None) makes a benchmark's question the one user message of the model's chat template, "text" a bare
    text. Prompts of the user's own (format "prompts") are taken as they are.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"--format {format}: unknown; known are {', '.join(FORMATS)}")
    violations: list[str] = []
    questions: list[Question] = []
    used: set[str] = set()
    num_left_out = 0
    for path in [path for name in data for path in located.files(name)]:
        rows = list(read_file(path, violations))
        if not rows:
            violations += [] if violations else [f"{path}: no rows in it"]
            continue
        name = format or _detect(path, rows)
        used.add(name)
        for number, row in rows:
            try:
                question = _question(name, row, path, number, suffix, prompt_as)
            except UserError as error:
                violations.append(f"{path}:{number}: {error}")
                continue
            if question is None:
                num_left_out += 1
            else:
                questions.append(question)
    violations += _repeated(questions)
    if used == {PROMPTS_FORMAT}:
        given = {"--suffix": suffix, "--prompt-as": prompt_as}
        violations += [
            f"{option} has no effect on prompts of one's own, which are taken as they are; remove it"
            for option, value in given.items()
            if value is not None
        ]
    if not questions and not violations:
        violations.append(f"{', '.join(data)}: all {num_left_out} rows ask for proofs or pictures, or have no box")
    if violations:
        raise UserError(first_violations(violations))
    return LoadedQuestions(tuple(questions), num_left_out)


def _detect(path: Path, rows: Sequence[tuple[int, Row]]) -> str:
    columns = {name for _, row in rows[:COLUMNS_OF_ROWS] for name in row}
    benchmark_name = next(
        (name for name, benchmark in BENCHMARKS.items() if benchmark.detect(columns, str(path).lower())), None
    )
    if benchmark_name is None and not columns & {*PROMPT_COLUMNS, *QUESTION_COLUMNS}:
        raise UserError(
            f"{path}: columns {', '.join(sorted(columns)[:12])} are those of no known format; "
            f"name one with --format: {', '.join(FORMATS)}"
        )
    return benchmark_name or PROMPTS_FORMAT


def _question(
    name: str, row: Row, path: Path, number: int, suffix: str | None, prompt_as: PromptAs | None
) -> Question | None:
    location = f"{path}:{number}"
    if name == PROMPTS_FORMAT:
        identity = text_field(row, "id") or str(number - 1)
        return Question(identity, task_of(row) or path.stem, prompt_of(row), answer_of(row), location)
    benchmark = BENCHMARKS[name]
    problem = benchmark.read(row)
    if problem is None:
        return None
    ending = benchmark.suffix if suffix is None else suffix
    text = problem.text
    if ending:
        text += ending if text[-1].isspace() else f" {ending}"
    prompt = {"prompt": text} if prompt_as == "text" else {"messages": [{"role": "user", "content": text}]}
    task = path.stem if name == GENERIC else name
    return Question(problem.id or f"{path.stem}:{number}", task, prompt, problem.answer, location, problem.tolerance)


def _repeated(questions: Sequence[Question]) -> list[str]:
    first_locations: dict[tuple[str, str], str] = {}
    return [
        f"{question.location}: id {question.id!r} of task {question.task} is that of {first} too; ids are unique"
        for question in questions
        if (first := first_locations.setdefault((question.task, question.id), question.location)) != question.location
    ]
