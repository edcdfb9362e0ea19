"""Which numbers stand beside the pictures? The tables, as text, each number with its standard error.

Left out: HTML; a cell is text and a hint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_powerflow.report.arms import Arm, differing_keys, estimate_of, estimate_pass_at, short_name
from megatron_powerflow.report.runs import Evaluation, EvaluationFile
from megatron_powerflow.report.seeds import Estimate

# column title -> value, decimals
COLUMNS = {
    "accuracy": ("accuracy", 3),
    "majority": ("maj", 3),
    "length (tokens)": ("response_length_mean", 1),
    "cut at limit": ("truncated_fraction", 3),
    "boxed": ("boxed_rate", 3),
    "entropy (nats)": ("policy_entropy", 3),
}
EVALUATION_COLUMNS = {title: column for title, column in COLUMNS.items() if title != "entropy (nats)"}
DIVERSITY_COLUMNS = {
    "distinct-1": ("distinct_1", 3),
    "distinct-2": ("distinct_2", 3),
    "self-BLEU": ("self_bleu", 3),
    "embedding distance": ("embedding_distance", 3),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """text: "0.958 ± 0.004"; hint: what the ± is over."""

    text: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. arm: place of the arm it belongs to (None: of no arm); first: the arm's first line."""

    arm: int | None
    first: bool
    head: tuple[str, ...]
    cells: tuple[Cell, ...]
    span: int = 1  # lines of the arm, on its first line


@dataclass(frozen=True, slots=True)
class Table:
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def arms_table(arms: Sequence[Arm]) -> Table:
    """Best and last evaluation of each trained arm, the evaluation of the others. head: seeds, steps, which, when."""
    rows: list[Row] = []
    for place, arm in enumerate(arms):
        lines = _lines(arm)
        for number, (which, at, evaluations) in enumerate(lines):
            seeds = str(len(arm.members)) if len(arm.members) == len(evaluations) or not evaluations else (
                f"{len(evaluations)} of {len(arm.members)}"
            )  # fmt: skip
            head = (seeds, _steps(arm), which, at)
            rows.append(Row(place, number == 0, head, _cells(evaluations, COLUMNS), len(lines)))
    columns = ("seeds", "steps", "evaluation", "at step", *COLUMNS, "pass@1", "pass@max")
    return _without_empty(Table(columns, tuple(rows)), keep=4 + 1)


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The one with the highest accuracy; of equals the earliest."""
    having = [e for e in evaluations if "accuracy" in e.values]
    return max(having, key=lambda e: e.values["accuracy"], default=None)


def start_sentence(arms: Sequence[Arm]) -> str:
    """What step 0 measured, over all runs of one starting model; "" where that cannot be said."""
    trained = [arm for arm in arms if arm.trained]
    runs = [run for arm in trained for run in arm.members]
    first = [run.evaluations[0] for run in runs if run.evaluations and run.evaluations[0].step == 0]
    found = estimate_of(first, "accuracy")
    if found is None or len({arm.config("model.hf_path") for arm in trained}) > 1:
        return ""
    length = estimate_of(first, "response_length_mean")
    tokens = "" if length is None else f" with responses of {_number(length, 1)} tokens"
    return f"Before training (step 0 of {found.num_seeds} runs) the accuracy is {_number(found, 3)}{tokens}."


def differences_table(arms: Sequence[Arm]) -> Table | None:
    """Every config key that is not the same in all trained arms; None when there is none."""
    trained = [(place, arm) for place, arm in enumerate(arms) if arm.trained]
    keys = differing_keys([arm.members[0].config for _, arm in trained])
    if len(trained) < 2 or not keys:
        return None
    rows = [
        Row(place, True, (), tuple(Cell(arm.config(key) if arm.config(key) is not None else "–") for key in keys))
        for place, arm in trained
    ]
    return Table(tuple(keys), tuple(rows))


def evaluations_table(arms: Sequence[Arm]) -> Table | None:
    """Every evaluation.json; one line per task where there are several. None when there are none."""
    rows: list[Row] = []
    for place, arm in enumerate(arms):
        mine: list[Row] = []
        for run in arm.members:
            for file in run.files:
                for task, evaluation in _tasks(file):
                    cells = (*_cells([evaluation], EVALUATION_COLUMNS), *_diversity([evaluation]))
                    mine.append(Row(place, not mine, (*_protocol(file), task), cells))
        rows += [Row(r.arm, r.first, r.head, r.cells, len(mine)) for r in mine]
    columns = ("data", "T", "responses", "seed", "task", *EVALUATION_COLUMNS, "pass@1", "pass@max", *DIVERSITY_COLUMNS)
    return _without_empty(Table(columns, tuple(rows)), keep=5) if rows else None


def _lines(arm: Arm) -> list[tuple[str, str, list[Evaluation]]]:
    """(which, at which steps, one evaluation per seed)."""
    if not arm.trained:
        return [("evaluated only", "–", [file.overall for file in arm.measured()])]
    having = [run.evaluations for run in arm.members if run.evaluations]
    if not having:
        return [("none in training", "–", [])]
    best = [found for evaluations in having if (found := best_of(evaluations))]
    last = [evaluations[-1] for evaluations in having]
    return [("best*", _range(best), best), ("last", _range(last), last)]


def _cells(evaluations: Sequence[Evaluation], columns: dict[str, tuple[str, int]]) -> tuple[Cell, ...]:
    cells = [_cell(estimate_of(evaluations, name), decimals) for name, decimals in columns.values()]
    largest = max((k for e in evaluations for k in e.pass_at), default=0)
    at_1, at_max = estimate_pass_at(evaluations, 1), estimate_pass_at(evaluations, largest)
    return (*cells, _cell(at_1, 3), _cell(at_max if largest > 1 else None, 3, f" (k={largest})"))


def _diversity(evaluations: Sequence[Evaluation]) -> tuple[Cell, ...]:
    return tuple(_cell(estimate_of(evaluations, name), decimals) for name, decimals in DIVERSITY_COLUMNS.values())


def _cell(found: Estimate | None, decimals: int, suffix: str = "") -> Cell:
    if found is None:
        return Cell("–", "not measured")
    over = {"seeds": f"standard error over {found.num_seeds} seeds", "questions": "standard error over questions"}
    hint = over.get(found.over, "one seed, and the evaluation gives no standard error")
    return Cell(_number(found, decimals) + suffix, hint)


def _number(found: Estimate, decimals: int) -> str:
    """Example: 0.958 ± 0.004; † marks an error over questions; without an error, the number alone."""
    mean = _decimal(found.mean, decimals)
    if found.se is None:
        return mean
    return f"{mean} ± {_decimal(found.se, decimals)}" + ("†" if found.over == "questions" else "")


def _decimal(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if abs(value) < 1e6 else f"{value:.3g}"


def _tasks(file: EvaluationFile) -> list[tuple[str, Evaluation]]:
    """All questions, and each task where there are several."""
    several = list(file.tasks.items()) if len(file.tasks) > 1 else []
    return [("all" if several else next(iter(file.tasks), "all"), file.overall), *several]


def _protocol(file: EvaluationFile) -> tuple[str, ...]:
    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:g}"

    return (short_name(file.data), shown(file.temperature), shown(file.num_responses), file.seed)


def _steps(arm: Arm) -> str:
    """Steps made, by seed: the number of lines' last step + 1."""
    made = [1 + max(max(series) for series in run.metrics.values()) for run in arm.members if run.metrics]
    return _span(made) if made else "–"


def _range(evaluations: Sequence[Evaluation]) -> str:
    return _span([e.step for e in evaluations])


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _without_empty(table: Table, *, keep: int) -> Table:
    """Columns that no row has a number for are left out; the first `keep`, heads included, stay."""
    heads = len(table.rows[0].head) if table.rows else 0
    used = [
        place
        for place in range(len(table.columns) - heads)
        if heads + place < keep or any(row.cells[place].text != "–" for row in table.rows)
    ]
    columns = (*table.columns[:heads], *(table.columns[heads + place] for place in used))
    rows = tuple(Row(r.arm, r.first, r.head, tuple(r.cells[place] for place in used), r.span) for r in table.rows)
    return Table(columns, rows)
