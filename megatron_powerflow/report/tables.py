"""Which numbers stand beside the pictures? The tables, as text, each number with its standard error.

Left out: HTML; a cell is text and a hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from megatron_powerflow.metrics.names import label
from megatron_powerflow.report.arms import Arm, differing_keys, estimate_of, estimate_pass_at, short_name
from megatron_powerflow.report.runs import Evaluation, EvaluationFile, StepEvaluation
from megatron_powerflow.report.seeds import Estimate

# value -> decimals
EVALUATION_COLUMNS = {
    "accuracy": 3,
    "maj": 3,
    "truncated_fraction": 3,
    "boxed_rate": 3,
    "response_length_mean": 1,
    "policy_entropy": 3,
}
DIVERSITY_COLUMNS = {
    "distinct_1": 3,
    "distinct_2": 3,
    "self_bleu": 3,
    "embedding_distance": 3,
    "quality": 3,
    "strategies": 2,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell holds what a table shows and what the reader sees on hovering. Example: text "0.958 ± 0.004"; hint:
    what the ± is over."""

    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row is one line of a table. arm: the index of the arm it belongs to, None where it belongs to none; first:
    whether it is the arm's first line."""

    arm: int | None
    first: bool
    head: tuple[str, ...]
    cells: tuple[Cell, ...]
    span: int = 1  # lines of the arm
    about: str = ""  # the arm, on its first line


@dataclass(frozen=True, slots=True)
class Table:
    """A table is the titles of its columns and its rows."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def arms_table(arms: Sequence[Arm]) -> Table:
    """List the best and the last in-training evaluation of each trained arm and its RUN/evaluation, and the one
    evaluation of every other arm.

    A row's head names the evaluation and its steps.
    """
    rows: list[Row] = []
    largest = _largest([e for arm in arms for _, _, evaluations in _lines(arm) for e in evaluations])
    for arm_index, arm in enumerate(arms):
        lines = _lines(arm)
        for number, (which, at_steps, evaluations) in enumerate(lines):
            seeds = str(len(arm.members)) if len(arm.members) == len(evaluations) or not evaluations else (
                f"{len(evaluations)} of {len(arm.members)}"
            )  # fmt: skip
            about = f"{seeds} {'seed' if seeds == '1' else 'seeds'}{_steps(arm)}"
            first = _cell(estimate_pass_at(evaluations, 1), 3)
            cells = (*_cells(evaluations, EVALUATION_COLUMNS), first, _at_largest(evaluations, largest))
            rows.append(Row(arm_index, number == 0, (f"{which}{at_steps}",), cells, len(lines), about))
    columns = ("evaluation", *map(label, EVALUATION_COLUMNS), "pass@1", _title(largest))
    return _without_empty(Table(columns, tuple(rows)), keep=2)


def best_of(evaluations: Sequence[StepEvaluation]) -> StepEvaluation | None:
    """Return the evaluation with the highest accuracy, the earliest of equals; None where none has an accuracy."""
    with_accuracy = [e for e in evaluations if "accuracy" in e.values]
    return max(with_accuracy, key=lambda e: e.values["accuracy"], default=None)


def start_sentence(arms: Sequence[Arm]) -> str:
    """Say what step 0 measured, over all runs. Returns "" where they start from several models or lack it."""
    trained = [arm for arm in arms if arm.trained]
    runs = [run for arm in trained for run in arm.members]
    first = [run.evaluations[0] for run in runs if run.evaluations and run.evaluations[0].step == 0]
    accuracy = estimate_of(first, "accuracy")
    if accuracy is None or len({arm.config("model.hf_path") for arm in trained}) > 1:
        return ""
    length = estimate_of(first, "response_length_mean")
    tokens = "" if length is None else f" with responses of {_number(length, 1)} tokens"
    return f"Before training (step 0 of {accuracy.num_seeds} runs) the accuracy is {_number(accuracy, 3)}{tokens}."


def differences_table(arms: Sequence[Arm]) -> Table | None:
    """List every config key that is not the same in all trained arms. Returns None when there is none."""
    trained = [(arm_index, arm) for arm_index, arm in enumerate(arms) if arm.trained]
    keys = differing_keys([config for arm in arms if (config := arm.members[0].config) is not None])
    if len(trained) < 2 or not keys:
        return None
    rows = [
        Row(arm_index, True, (), tuple(Cell("–" if (value := arm.config(key)) is None else value) for key in keys))
        for arm_index, arm in trained
    ]
    return Table(tuple(keys), tuple(rows))


def evaluations_table(arms: Sequence[Arm]) -> Table | None:
    """List every evaluation.json, a line for each task where there are several. Returns None when there are none."""
    rows: list[Row] = []
    largest = _largest([file.overall for arm in arms for run in arm.members for file in run.files])
    for arm_index, arm in enumerate(arms):
        arm_rows: list[Row] = []
        for run in arm.members:
            for file in run.files:
                for task, evaluation in _tasks(file):
                    how_good, how_diverse = (_cells([evaluation], c) for c in (EVALUATION_COLUMNS, DIVERSITY_COLUMNS))
                    cells = (*how_good, _at_largest([evaluation], largest), *how_diverse)
                    seed = run.seed if arm.trained else file.seed
                    arm_rows.append(Row(arm_index, not arm_rows, (*_protocol(file), seed, task), cells))
        rows += [Row(r.arm, r.first, r.head, r.cells, len(arm_rows)) for r in arm_rows]
    heads = ("data", "T", "responses", "seed", "task")
    columns = (*heads, *map(label, EVALUATION_COLUMNS), _title(largest), *map(label, DIVERSITY_COLUMNS))
    return _without_empty(Table(columns, tuple(rows)), keep=len(heads)) if rows else None


def _lines(arm: Arm) -> list[tuple[str, str, Sequence[Evaluation]]]:
    """Return (title, at which steps, one evaluation per seed) for each line of an arm."""
    files = arm.measured()
    of_files = [file.overall for file in files]
    if not arm.trained:
        return [("evaluated only", "", of_files)]
    by_seed = [run.evaluations for run in arm.members if run.evaluations]
    best = [best_evaluation for evaluations in by_seed if (best_evaluation := best_of(evaluations))]
    last = [evaluations[-1] for evaluations in by_seed]
    lines: list[tuple[str, str, Sequence[Evaluation]]] = []
    if best:
        lines.append(("best* at ", _range(best), best))
    if last:
        lines.append(("last, at ", _range(last), last))
    if files:
        lines.append((_of_the_files(files), "", of_files))
    return lines or [("not evaluated", "", [])]


def _of_the_files(files: Sequence[EvaluationFile]) -> str:
    """Name what was evaluated, with the checkpoint where seeds share it. Example: step_000340 on MATH-500, T=1."""
    policies = {PurePath(file.model).name for file in files}
    policy = f"{policies.pop()} " if len(policies) == 1 else ""
    temperature = "" if files[0].temperature is None else f", T={files[0].temperature:g}"
    return f"{policy}on {short_name(files[0].data)}{temperature}"


def _cells(evaluations: Sequence[Evaluation], columns: dict[str, int]) -> tuple[Cell, ...]:
    return tuple(_cell(estimate_of(evaluations, name), decimals) for name, decimals in columns.items())


def _largest(evaluations: Sequence[Evaluation]) -> int | None:
    """Return the largest k of pass@k where all evaluations agree on it; else None, and each line states its own."""
    largest_ks = {max(e.pass_at) for e in evaluations if e.pass_at}
    return largest_ks.pop() if len(largest_ks) == 1 else None


def _title(largest: int | None) -> str:
    return "pass@max" if largest is None else f"pass@{largest}"


def _at_largest(evaluations: Sequence[Evaluation], largest: int | None) -> Cell:
    k = max((k for e in evaluations for k in e.pass_at), default=0)
    estimate = estimate_pass_at(evaluations, k) if k > 1 else None
    return _cell(estimate, 3, f" @{k}" if largest is None else "")


def _cell(estimate: Estimate | None, decimals: int, suffix: str = "") -> Cell:
    if estimate is None:
        return Cell("–", "not measured")
    over = {"seeds": f"standard error over {estimate.num_seeds} seeds", "questions": "standard error over questions"}
    hint = "one seed, and the evaluation gives no standard error" if estimate.over is None else over[estimate.over]
    return Cell(_number(estimate, decimals) + suffix, hint)


def _number(estimate: Estimate, decimals: int) -> str:
    """Write an estimate. Example: 0.958 ± 0.004; † marks an error over questions; no error: the number alone."""
    mean = _decimal(estimate.mean, decimals)
    if estimate.se is None:
        return mean
    return f"{mean} ± {_decimal(estimate.se, decimals)}" + ("†" if estimate.over == "questions" else "")


def _decimal(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _tasks(file: EvaluationFile) -> list[tuple[str, Evaluation]]:
    """Return the evaluation of all questions; where there are several tasks also their plain mean, and each."""
    several = list(file.tasks.items()) if len(file.tasks) > 1 else []
    plain = [("mean over tasks", file.over_tasks)] if several and file.over_tasks else []
    return [("all questions" if several else next(iter(file.tasks), "all"), file.overall), *plain, *several]


def _protocol(file: EvaluationFile) -> tuple[str, ...]:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:g}"

    return (short_name(file.data), shown(file.temperature), shown(file.num_responses))


def _steps(arm: Arm) -> str:
    """Say how many steps the seeds made: the last step of their lines, plus 1."""
    made = [1 + max(max(series) for series in run.metrics.values()) for run in arm.members if run.metrics]
    return f", {_span(made)} steps" if made else ""


def _range(evaluations: Sequence[StepEvaluation]) -> str:
    return _span([e.step for e in evaluations])


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _without_empty(table: Table, *, keep: int) -> Table:
    """Leave out the columns for which no row has a number; the first `keep`, heads included, stay."""
    heads = len(table.rows[0].head) if table.rows else 0
    used = [
        column
        for column in range(len(table.columns) - heads)
        if heads + column < keep or any(row.cells[column].text != "–" for row in table.rows)
    ]
    columns = (*table.columns[:heads], *(table.columns[heads + column] for column in used))
    rows = tuple(
        Row(r.arm, r.first, r.head, tuple(r.cells[column] for column in used), r.span, r.about) for r in table.rows
    )
    return Table(columns, rows)
