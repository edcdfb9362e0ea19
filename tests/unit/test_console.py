"""The console: paths stay as they are, a log has a line a minute, the time left agrees with itself."""

from __future__ import annotations

import ast
import io
import time
from pathlib import Path

import pytest

from megatron_powerflow.commands.rounds import progress_bar
from megatron_powerflow.console import Heartbeat, duration, make_console
from megatron_powerflow.metrics.writers import ConsoleWriter
from megatron_powerflow.records import StepMetrics
from tests.conftest import REPOSITORY

PATH = "/data/[bold]runs[/bold]/of :smile: a [very] long [link=x]name/" + "folder/" * 30 + "step_000340"
VALUES = {
    "loss": 0.5,
    "response_length_mean": 27.94,
    "truncated_fraction": 0.031,
    "tokens_per_second": 3310.0,
    "step_seconds": 2.861,
}


def said(console) -> list[str]:
    return console.file.getvalue().splitlines()


def test_a_path_is_printed_as_it_is_on_one_line():
    console = make_console(io.StringIO(), width=40)
    console.print(f"wrote {PATH}")
    console.print(f"done: {PATH}\n  serve it  vllm serve {PATH}")
    assert said(console) == [f"wrote {PATH}", f"done: {PATH}", f"  serve it  vllm serve {PATH}"]


@pytest.mark.parametrize("folder", ["megatron_powerflow", "tools", "examples", "benchmarks"])
def test_every_console_is_one_that_leaves_paths_alone(folder):
    """A console of rich's own reads [brackets] in a path as markup and wraps it."""
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files
    for file in files:
        calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Console"]
        assert not made or file == REPOSITORY / "megatron_powerflow" / "console.py", file


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3590, "1.0 h"), (90_000, "25.0 h")],
)
def test_durations_never_say_60_of_a_unit(seconds, text):
    assert duration(seconds) == text


def test_a_log_has_a_line_whenever_it_was_quiet_for_long():
    console = make_console(io.StringIO())
    with Heartbeat(console, lambda: "still at it", quiet_seconds=2.0) as heartbeat:
        for _ in range(6):  # a print that comes in time puts the line off
            time.sleep(0.02)
            heartbeat.spoke()
        assert said(console) == []
        give_up = time.monotonic() + 60
        while len(said(console)) < 2 and time.monotonic() < give_up:
            time.sleep(0.05)
    count = len(said(console))
    assert count >= 2
    assert set(said(console)) == {"still at it"}
    time.sleep(2.5)
    assert len(said(console)) == count  # ended


def test_a_heartbeat_with_nothing_to_say_is_silent():
    console = make_console(io.StringIO())
    with Heartbeat(console, lambda: "", quiet_seconds=0.02):
        time.sleep(0.2)
    assert said(console) == []


def test_the_line_of_a_step_has_truncated_share_and_seconds_a_step():
    console = make_console(io.StringIO(), width=40)
    writer = ConsoleWriter(console, first_step=0, num_steps=2)
    for step in range(2):
        writer.write(StepMetrics(step, VALUES))
    writer.close()
    first, last = said(console)
    assert first.startswith(
        "step 1/2  loss 0.5  log Z' -  length 27.9  truncated 3.1%  grad -  3310 tok/s  2.86 s/step  "
    )
    assert first.endswith(" left")
    assert last.endswith("2.86 s/step")  # nothing is left


def test_the_time_left_agrees_with_itself():
    """Steps of a quarter of a second, 2,000 of them: about 8 minutes, in the lines of steps and in those between."""
    console, now = make_console(io.StringIO()), [0.0]
    writer = ConsoleWriter(console, first_step=100, num_steps=2100, clock=lambda: now[0])
    writer.phase("rollout 1/16")
    now[0] = 0.2
    assert writer.under_way() == "step 100/2100 done  rollout 1/16  0 s so far"  # nothing is known yet
    within = []
    for step in range(100, 104):
        now[0] = 0.25 * (step - 99)
        writer.write(StepMetrics(step, VALUES))
        writer.phase("update")
        for spent in (0.1, 0.2, 3.0):  # the last one: a step that takes longer than the others
            now[0] = 0.25 * (step - 99) + spent
            within.append(writer.under_way())
    writer.close()
    assert all(
        line.endswith("  update  0 s so far  8 min left") or "  3 s so far  8 min left" in line for line in within
    )
    lines = said(console)
    assert len(lines) == 4
    assert all(line.endswith("  8 min left") for line in lines)


def test_a_bar_is_a_line_a_minute_where_there_is_no_terminal():
    console = make_console(io.StringIO())
    with progress_bar(console, True) as bar:
        task = bar.add_task("evaluating", total=500)
        bar.advance(task, 34)
    assert said(console) == []  # quick: nothing to say
    with progress_bar(console, False) as bar:  # a rank that does not print
        bar.add_task("evaluating", total=500)
    assert said(console) == []


def test_a_table_of_results_does_not_wrap_the_model(tmp_path: Path):
    from megatron_powerflow.evaluation.results import results_table, table_title

    row = {"num_questions": 500, "avg": 0.8123, "avg_se": 0.0123, "pass_at": {"1": 0.8, "16": 0.9}, "maj": 0.85}
    row |= {"pass_at_se": {"16": 0.01}, "response_length_mean": 1532.0, "truncated_fraction": 0.125, "boxed_rate": 0.9}
    results = {"model": PATH, "num_responses": 16, "temperature": 1.0, "tasks": {"MATH-500": row}, "all": row}
    console = make_console(io.StringIO(), width=80)
    console.print(table_title(results))
    console.print(results_table(results))
    assert said(console)[0] == f"{PATH}, 16 responses a question, temperature 1"
    shown = console.file.getvalue()
    assert all(text in shown for text in ("truncated", "81.2 ± 1.2", "90.0 ± 1.0", "12.5", "MATH-500"))
    assert "…" not in shown
