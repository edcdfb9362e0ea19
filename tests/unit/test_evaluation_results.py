"""From texts to evaluation.json: fifty stored responses against a computation of its own, by hand-made labels."""

from __future__ import annotations

import io
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import pytest

from megatron_powerflow.console import make_console
from megatron_powerflow.data.answers import Grade, grade
from megatron_powerflow.evaluation.answering import response_lines
from megatron_powerflow.evaluation.diversity import measure_diversity
from megatron_powerflow.evaluation.questions import Question
from megatron_powerflow.evaluation.results import count_questions, describe_results, results_table, write_results
from megatron_powerflow.metrics.counts import summarize_tasks
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.report import frontier, tables
from megatron_powerflow.report.runs import read_runs

# text, gold, and what a person read in it: `value` names its answer (null: none in a box), `right`
FIFTY = [
    json.loads(line) for line in (Path(__file__).parent / "data" / "fifty_responses.jsonl").read_text().splitlines()
]
NAMES = {
    *("num_questions", "num_responses", "avg", "avg_se", "pass_at", "pass_at_se", "maj", "response_length_mean"),
    *("truncated_fraction", "boxed_rate", "policy_entropy"),
}


def nats(row: dict) -> float:
    """Log-prob of each token of a stored response; another one for each response of a question."""
    return -0.25 * (1 + row["response_index"])


def graded_lines() -> list[dict]:
    """What `powerflow evaluate` writes of these texts: token 0 of a rollout stands for its text."""
    lines = []
    for (task, identity), rows in itertools.groupby(FIFTY, key=lambda row: (row["task"], row["id"])):
        rows = list(rows)
        question = Question(identity, task, {"prompt": "?"}, rows[0]["gold"], "here")
        group = [
            Rollout(
                prompt=Prompt(identity, 0, (1,)),
                slot=0,
                response_index=row["response_index"],
                response_token_ids=(row["response_index"],) * row["num_response_tokens"],
                rollout_log_probs=(nats(row),) * row["num_response_tokens"],
                finish_reason=row["finish_reason"],
            )
            for row in rows
        ]
        lines += response_lines(group, question, lambda token_ids, rows=rows: rows[token_ids[0]]["text"])
    return lines


def independent_summary(rows: list[dict]) -> dict:
    """The same row of the table, from the labels, in another way: subsets are enumerated, votes counted by name."""
    questions = [list(group) for _, group in itertools.groupby(rows, key=lambda row: (row["task"], row["id"]))]
    means = [statistics.mean(row["right"] for row in question) for question in questions]
    passes, majority = {}, []
    for k in (1, 2, 4):
        chances = [
            statistics.mean(any(row["right"] for row in some) for some in itertools.combinations(question, k))
            for question in questions
        ]
        passes[str(k)] = statistics.mean(chances), statistics.stdev(chances) / len(chances) ** 0.5
    for question in questions:
        values = [row["value"] for row in question if row["value"] is not None]
        modes = statistics.multimode(values)
        right = {row["value"] for row in question if row["right"]}
        majority.append(len(right & set(modes)) / len(modes) if modes else 0.0)
    return {
        "num_questions": len(questions),
        "num_responses": len(rows),
        "avg": statistics.mean(means),
        "avg_se": statistics.stdev(means) / len(means) ** 0.5,
        "pass_at": {k: value for k, (value, _) in passes.items()},
        "pass_at_se": {k: error for k, (_, error) in passes.items()},
        "maj": statistics.mean(majority),
        "response_length_mean": statistics.mean(row["num_response_tokens"] for row in rows),
        "truncated_fraction": statistics.mean(row["finish_reason"] == "length" for row in rows),
        "boxed_rate": statistics.mean(row["value"] is not None for row in rows),
        "policy_entropy": statistics.fmean(
            [-nats(row) for row in rows], weights=[row["num_response_tokens"] for row in rows]
        ),
    }


def test_fifty_stored_responses_give_the_counts_of_an_independent_computation():
    assert len(FIFTY) == 50
    lines = graded_lines()
    assert [line["correct"] for line in lines] == [row["right"] for row in FIFTY]
    tasks, everything = summarize_tasks(count_questions(lines))
    assert list(tasks) == ["algebra", "choices"]
    for found, rows in (
        (everything, FIFTY),
        *((tasks[name], [row for row in FIFTY if row["task"] == name]) for name in tasks),
    ):
        expected = independent_summary(rows)
        assert found.keys() == expected.keys() == NAMES
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-12), name
    assert 0.3 < everything["avg"] < 0.7  # the fixture distinguishes
    assert everything["maj"] not in (0.0, 1.0, everything["avg"])


def test_evaluation_json_has_the_promised_names():
    settings = {"model": "m", "data": "d", "num_responses": 5, "temperature": 1.0, "seed": 3, "dtype": "fp32"}
    results = describe_results(settings, graded_lines(), {"distinct_1": 0.5}, "powerflow evaluate")
    assert list(results) == [
        *("model", "data", "num_responses", "temperature", "seed", "tasks", "all"),
        *("mean_over_tasks", "diversity", "command", "versions", "git_commit"),
    ]
    assert all(row.keys() == NAMES for row in (*results["tasks"].values(), results["all"]))
    assert json.loads(json.dumps(results)) == results
    assert {"python", "torch", "megatron-core", "megatron_powerflow"} <= results["versions"].keys()
    assert results["git_commit"] is None or len(results["git_commit"]) == 40


def test_the_table_shows_every_task_and_survives_tasks_without_gold():
    settings = {"model": "m", "data": "d", "num_responses": 5, "temperature": 1.0, "seed": 3}
    lines = graded_lines()
    lines += [{**line, "task": "poem", "gold": None, "correct": None} for line in lines[:5]]
    results = describe_results(settings, lines, {}, "")
    console = make_console(io.StringIO(), width=150)
    console.print(results_table(results))
    shown = console.file.getvalue()
    assert [name for name in ("algebra", "choices", "poem", "all questions", "mean over tasks") if name in shown] == [
        "algebra",
        "choices",
        "poem",
        "all questions",
        "mean over tasks",
    ]
    assert f"{100 * results['tasks']['algebra']['avg']:.1f} ± " in shown
    assert results["tasks"]["poem"]["avg"] is None
    assert results["all"]["num_questions"] == 11


def test_answers_spelt_alike_share_their_grade_and_missing_ones_have_no_cluster():
    answers = ["1/2", None, "0.5", "1/2", "3"]
    assert grade(answers, "\\frac12") == [
        Grade(True, 0),
        Grade(False, None),
        Grade(True, 0),
        Grade(True, 0),
        Grade(False, 1),
    ]
    assert [item.correct for item in grade(answers, None)] == [None] * 5
    assert grade([], "1") == []


@pytest.mark.parametrize(
    ("answer", "tolerance", "right"),
    [
        ("2.55", 0.1, True),
        ("2.6", 0.1, True),  # at the edge, in exact arithmetic
        ("2.61", 0.1, False),
        ("2.55", None, False),
        ("-2.5", 0.1, False),
        ("about 2.5", 1.0, False),
        ("9" * 10_000, 1.0, False),
        ("1e400", 1.0, False),
    ],
)
def test_a_published_tolerance_is_honoured(answer, tolerance, right):
    assert grade([answer], "2.5", tolerance)[0].correct is right


def test_a_report_finds_every_number_that_an_evaluation_states(tmp_path):
    settings = {"model": "m", "data": "d", "num_responses": 5, "temperature": 1.0, "seed": 3}
    diversity = measure_diversity([["one two three four", "four three two one"]], lambda texts: np.eye(len(texts)))
    results = describe_results(settings, graded_lines(), diversity, "powerflow evaluate")
    judged = {"mean": 0.7, "se": 0.1, "num_judged": 9, "num_unparsed": 1, "num_unanswered": 0}
    write_results(tmp_path, results | {"judge": {"quality": judged, "strategy": judged | {"mean": 3.5}}})
    notes: list[str] = []
    values = read_runs([tmp_path], notes)[0].files[0].overall.values
    assert not notes
    shown = tables.EVALUATION_COLUMNS.keys() | tables.DIVERSITY_COLUMNS.keys()
    assert {*shown, *frontier.QUALITY, *frontier.DIVERSITY} <= values.keys()
    assert values["accuracy"] == results["all"]["avg"]
    assert values["embedding_distance"] == diversity["embedding_distance"]
    assert (values["quality"], values["quality_se"], values["strategies"]) == (0.7, 0.1, 3.5)


def test_a_report_shows_an_evaluation_without_gold_answers(tmp_path):
    settings = {"model": "m", "data": "d", "num_responses": 5, "temperature": 1.0, "seed": 3}
    lines = [line | {"gold": None, "correct": None} for line in graded_lines()]
    write_results(tmp_path, describe_results(settings, lines, {"distinct_2": 0.5}, ""))
    values = read_runs([tmp_path], [])[0].files[0].overall.values
    assert "accuracy" not in values
    assert values["distinct_2"] == 0.5
