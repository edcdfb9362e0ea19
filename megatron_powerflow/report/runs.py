"""What does one RUN argument hold? A run folder, or evaluations alone, as numbers by name and step.

Left out: which runs belong together (`arms.py`); means over seeds (`seeds.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.goodput import EVENTS_NAME, Goodput
from megatron_powerflow.metrics.step_log import START, without_step
from megatron_powerflow.report.goodput_table import read_goodput
from megatron_powerflow.report.reading import number, read_config, read_json, read_json_lines, visible

CONFIG_NAME = "config.yaml"
METRICS_NAME = "metrics.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"
SAMPLES_NAME = "samples.jsonl"
EVALUATION_NAME = "evaluation.json"
LAUNCHES_NAME = "launches.jsonl"
OWN_FOLDER = "evaluation"  # RUN/evaluation: what `powerflow train` tells its user to make
MAX_EVALUATION_FILES = 1000
MAX_PASS_AT = 2**30
# evaluation.json says avg where evaluations.jsonl says accuracy
RENAMED = {"avg": "accuracy", "avg_se": "accuracy_se"}
JUDGED = {"quality": "quality", "strategy": "strategies"}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation is one measurement of one policy.

    values: accuracy, accuracy_se, response_length_mean (tokens), truncated_fraction, boxed_rate, maj,
    policy_entropy, distinct_2, quality, ...: those that were measured. pass_at: k -> share of questions with a right
    answer among k.
    """

    values: Mapping[str, float]
    pass_at: Mapping[int, float]
    pass_at_se: Mapping[int, float]  # over questions


@dataclass(frozen=True, slots=True)
class StepEvaluation(Evaluation):
    """An evaluation of a run in training, at a step of it."""

    step: int


@dataclass(frozen=True, slots=True)
class Origin:
    """An origin is what started a run or an evaluation: its command ("" where not stated) and versions ({})."""

    command: str
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EvaluationFile:
    """What one evaluation.json holds. where: its folder, as shown; own: whether it is RUN/evaluation; over_tasks:
    the plain mean of the tasks' accuracies."""

    where: str
    own: bool
    model: str
    data: str
    temperature: float | None
    num_responses: float | None
    seed: str
    overall: Evaluation
    tasks: Mapping[str, Evaluation]
    over_tasks: Evaluation | None
    origin: Origin


@dataclass(frozen=True, slots=True)
class Run:
    """A run is one seed of one arm. config is None where the argument was an evaluation and not a run."""

    shown: str  # the folder as it was given
    seed: str
    config: Mapping[str, str] | None
    metrics: Mapping[str, Mapping[int, float]] = field(default_factory=dict)  # name -> step -> value
    evaluations: Sequence[StepEvaluation] = ()  # in training, by step
    samples: Sequence[Mapping[str, Any]] = ()
    files: Sequence[EvaluationFile] = ()
    launches: Sequence[Origin] = ()  # each start of the run, the first one first
    goodput: Goodput | None = None  # None where the folder does not tell


def read_runs(folders: Sequence[Path], notes: list[str]) -> list[Run]:
    """Read the run, or the evaluations, in each folder; what is damaged is added to `notes`.

    Raises UserError naming each folder that holds neither, and each that was given twice.
    """
    all_runs, violations, seen = [], [], set()
    for folder in folders:
        if not folder.is_dir():
            violations.append(f"{folder}: no such folder; give run folders or folders with an {EVALUATION_NAME}")
        elif folder.resolve() in seen:
            violations.append(f"{folder}: given twice; one run is one seed; give it once")
        else:
            seen.add(folder.resolve())
            runs = _read_folder(folder, notes)
            all_runs += runs
            if not runs:
                violations.append(
                    f"{folder}: no step in {METRICS_NAME}, no line in {EVALUATIONS_NAME} and no {EVALUATION_NAME} "
                    "with numbers in it or below; is this a run's folder, and has it made a step?"
                )
    if violations:
        raise UserError(violations)
    return all_runs


def _read_folder(folder: Path, notes: list[str]) -> list[Run]:
    shown = visible(folder, 200)
    files = [file for path in _evaluation_paths(folder) if (file := _read_file(path, folder, notes))]
    metrics = _metrics(folder / METRICS_NAME, notes)
    evaluations = _evaluations(folder / EVALUATIONS_NAME, notes)
    if metrics or evaluations or (folder / CONFIG_NAME).is_file():
        if not (metrics or evaluations or files):
            return []
        config = read_config(folder / CONFIG_NAME, notes)
        if config is None:
            notes.append(f"{folder}: no readable {CONFIG_NAME}; the run is an arm of its own")
            config = {"folder.path": shown}
        files = _of_the_policy(files, config.get("model.hf_path", ""), notes)
        samples = read_json_lines(folder / SAMPLES_NAME, notes)
        launches = [_origin(line) for line in read_json_lines(folder / LAUNCHES_NAME, notes)]
        seed = config.get("run.seed", "?")
        of_time: list[str] = []
        goodput = read_goodput(folder, of_time)
        notes += [note for note in of_time if EVENTS_NAME in note]  # of the other files it was said
        return [Run(shown, seed, config, metrics, evaluations, samples, files, launches, goodput)]
    by_policy: dict[tuple, list[EvaluationFile]] = {}
    for file in files:
        by_policy.setdefault((file.model, file.temperature, file.num_responses, file.seed), []).append(file)
    return [Run(shown, policy[-1], None, files=policy_files) for policy, policy_files in by_policy.items()]


def _of_the_policy(files: Sequence[EvaluationFile], base: str, notes: list[str]) -> list[EvaluationFile]:
    """Leave out evaluations of the run's base model, which `powerflow evaluate --reference` makes: they are not of
    the trained policy."""
    of_the_base = [file for file in files if file.model in (base, str(Path(base).resolve()))]
    notes += [
        f"{file.where}: an evaluation of the base model; it is in no row of the trained arm. Give this folder to the "
        "report, too, and it is an arm of its own"
        for file in of_the_base
    ]
    return [file for file in files if file not in of_the_base]


def _evaluation_paths(folder: Path) -> list[Path]:
    """Return the evaluation files of this run. A folder below with metrics of its own is another run."""

    def walk() -> Iterator[Path]:
        for where, folders, names in os.walk(folder):
            if Path(where) != folder and METRICS_NAME in names:
                folders.clear()
                continue
            if EVALUATION_NAME in names:
                yield Path(where) / EVALUATION_NAME

    return sorted(walk(), key=lambda path: natural(str(path)))[:MAX_EVALUATION_FILES]


def natural(text: str) -> list[tuple[int, str]]:
    """Return a sort key that puts step_9 before step_10."""
    parts = re.split(r"([0-9]+)", text)  # every second part is a number
    return [(int(part[:18]), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]


def _metrics(path: Path, notes: list[str]) -> dict[str, dict[int, float]]:
    series: dict[str, dict[int, float]] = {}
    dropped: set[str] = set()
    for line in _with_step(path, notes):
        for name, value in line.items():
            if name == "step":
                continue
            finite = number(value)
            if finite is None:
                dropped.add(visible(name, 40))
            else:
                series.setdefault(name, {})[line["step"]] = finite
    if dropped:
        names = ", ".join(sorted(dropped)[:8])
        notes.append(f"{path}: values that are no finite numbers are left out, in: {names}")
    return series


def _evaluations(path: Path, notes: list[str]) -> list[StepEvaluation]:
    by_step = {line["step"]: _evaluation(line) for line in _with_step(path, notes)}
    return [
        StepEvaluation(evaluation.values, evaluation.pass_at, evaluation.pass_at_se, step)
        for step, evaluation in sorted(by_step.items())
        if evaluation.values
    ]


def _with_step(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Read the lines whose `step` is a step. Of two lines of one step the later counts, as callers overwrite."""
    return read_json_lines(path, notes, without_step, start=START)


def _evaluation(fields: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> Evaluation:
    """Make an evaluation of one X of evaluation.json or a line of evaluations.jsonl. beside: what stands beside X."""
    values = {
        RENAMED.get(name, name): finite
        for name, value in {**fields, **(beside or {})}.items()
        if name != "step" and (finite := number(value)) is not None
    }
    return Evaluation(values, _by_count(fields.get("pass_at")), _by_count(fields.get("pass_at_se")))


def _judged(kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return a judge's scores: quality(_se), of texts, and strategies(_se), 1 to 5, of solutions."""
    values: dict[str, Any] = {}
    for kind, name in JUDGED.items():
        scores = _mapping(kinds.get(kind))
        values |= {name: scores.get("mean"), f"{name}_se": scores.get("se")}
    return values


def _by_count(value: Any) -> dict[int, float]:
    pairs = {}
    for key, item in _mapping(value).items():
        finite = number(item)
        if re.fullmatch(r"[0-9]{1,10}", str(key)) and 1 <= int(key) <= MAX_PASS_AT and finite is not None:
            pairs[int(key)] = finite
    return dict(sorted(pairs.items()))


def _read_file(path: Path, run: Path, notes: list[str]) -> EvaluationFile | None:
    fields = read_json(path, notes)
    if fields is None:
        return None
    beside = _mapping(fields.get("diversity")) | _judged(_mapping(fields.get("judge")))
    overall = _evaluation(_mapping(fields.get("all")), beside)
    if not overall.values:
        notes.append(f'{path}: no number under "all", left out')
        return None
    tasks = {visible(name, 60): _evaluation(_mapping(value)) for name, value in _mapping(fields.get("tasks")).items()}
    return EvaluationFile(
        where=visible(path.parent, 200),
        own=path.parent == run / OWN_FOLDER,
        model=visible(fields.get("model", "?"), 200),
        data=visible(fields.get("data", "?"), 200),
        temperature=number(fields.get("temperature")),
        num_responses=number(fields.get("num_responses")),
        seed=visible(fields.get("seed", "?"), 20),
        overall=overall,
        tasks=tasks,
        over_tasks=_plain_mean(fields),
        origin=_origin(fields),
    )


def _plain_mean(fields: Mapping[str, Any]) -> Evaluation | None:
    """Return `mean_over_tasks`; None where an older version wrote the file, or nothing in it is graded."""
    evaluation = _evaluation(_mapping(fields.get("mean_over_tasks")))
    return evaluation if "accuracy" in evaluation.values else None


def _origin(fields: Mapping[str, Any]) -> Origin:
    command = fields.get("command", "")
    return Origin(
        command=visible(" ".join(map(str, command)) if isinstance(command, list) else command, 500),
        versions={visible(k, 40): visible(v, 80) for k, v in _mapping(fields.get("versions")).items()},
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
