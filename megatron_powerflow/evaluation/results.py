"""What did an evaluation find? OUT/evaluation.json, and a table for people.

    {"model", "data", "num_responses", "temperature", "seed", "tasks": {task: row}, "all": row,
     "mean_over_tasks": {...}, "diversity": {...}, "command", "versions", "git_commit", "revisions"}

A row is what `summarize` of metrics/counts.py returns. Its num_responses counts all responses of the task, while the
num_responses beside `model` counts those of one question. `all` weighs questions alike, so that a large benchmark
dominates; `mean_over_tasks` (num_tasks, avg, avg_se) weighs benchmarks alike, as the paper's Avg does. `diversity` is
empty where it was not asked for. `judge`, by kind of judgement, exists where a judge was asked, and `revisions` where a
name was the hub's.

Left out: plots and comparisons of several evaluations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from megatron_powerflow.evaluation.responses import EVALUATION_NAME, Line, by_question
from megatron_powerflow.metrics.counts import QuestionCounts, mean_over_tasks, summarize_tasks
from megatron_powerflow.metrics.provenance import provenance
from megatron_powerflow.whole_files import write_file


def count_questions(lines: Sequence[Line]) -> list[QuestionCounts]:
    """Returns the counts of each question, from the lines of responses.jsonl."""
    return [
        QuestionCounts(
            task=task,
            num_response_tokens=tuple(line["num_response_tokens"] for line in responses),
            truncated=tuple(line["finish_reason"] == "length" for line in responses),
            clusters=tuple(line["cluster"] for line in responses),
            correct=None if responses[0]["gold"] is None else tuple(line["correct"] for line in responses),
            sequence_log_probs=tuple(line["sequence_log_prob"] for line in responses),
        )
        for (task, _), responses in by_question(lines).items()
    ]


def describe_results(
    settings: Line,
    lines: Sequence[Line],
    diversity: dict,
    command: str,
    revisions: Mapping[str, str] | None = None,
) -> dict:
    """Returns the content of evaluation.json. revisions: name on the hub -> commit."""
    tasks, everything = summarize_tasks(count_questions(lines))
    named = {name: settings[name] for name in ("model", "data", "num_responses", "temperature", "seed")}
    return {
        **named,
        "tasks": tasks,
        "all": everything,
        "mean_over_tasks": mean_over_tasks(tasks),
        "diversity": diversity,
        **provenance(command, revisions),
    }


def write_results(out: Path, results: dict) -> Path:
    """Writes evaluation.json and returns its path."""
    path = out / EVALUATION_NAME
    write_file(path, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())
    return path


def table_title(results: dict) -> str:
    """Returns the line above the table. A title of the table itself would be wrapped inside the model's path."""
    k, temperature = results["num_responses"], results["temperature"]
    return f"{results['model']}, {k} responses a question, temperature {temperature:g}"


def results_table(results: dict) -> Table:
    """Returns the table for the console.

    Accuracies are percentages with their standard errors over questions; lengths are in tokens; truncated and boxed are
    percentages of responses.
    """
    k = results["num_responses"]
    last = max(map(int, results["all"]["pass_at"]), default=1)
    table = Table(box=None, padding=(0, 2, 0, 0))  # without lines it is whole in 80 columns
    table.add_column("task")
    passes = [f"pass@{last}"] if last > 1 else []
    for name in ("questions", f"avg@{k}", *passes, *([f"maj@{k}"] if k > 1 else []), "tokens", "truncated", "boxed"):
        table.add_column(name, justify="right", no_wrap=True)
    rows = list(results["tasks"].items())
    for name, row in [*rows, ("all questions", results["all"])] if len(rows) > 1 else rows:
        cells = [name, str(row["num_questions"]), _percent(row["avg"], row["avg_se"])]
        if passes:
            cells.append(_percent(row["pass_at"].get(str(last)), row["pass_at_se"].get(str(last))))
        if k > 1:
            cells.append(_percent(row["maj"]))
        cells += [f"{row['response_length_mean']:.0f}", *map(_percent, (row["truncated_fraction"], row["boxed_rate"]))]
        table.add_row(*cells)
    plain = results.get("mean_over_tasks", {"num_tasks": 0})
    if plain["num_tasks"] > 1:
        table.add_row("mean over tasks", f"{plain['num_tasks']} tasks", _percent(plain["avg"], plain["avg_se"]))
    return table


def _percent(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")
