"""What falls out of a published file, and why: 500 rows in NuminaMath-CoT's format, 60 of them for six reasons."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from rich.console import Console

from megatron_powerflow.data.overlap import Overlap
from megatron_powerflow.data.prompts import load_prompts
from megatron_powerflow.data.tokenizer import load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.prepare import Outputs, lines_of, prepare
from tests.tiny_models import write_tokenizer

LEAKED = (
    "A farmer has {} sheep and sells every third one at the market; how many sheep does the farmer have left at home?"
)


def numina(problem: str, solution: str) -> dict:
    messages = [{"role": "user", "content": problem}, {"role": "assistant", "content": solution}]
    return {"source": "synthetic_math", "problem": problem, "solution": solution, "messages": messages}


def made_rows() -> tuple[list[dict], dict[str, set[int]]]:
    """(rows, reason -> places that must fall out)."""
    rows = [numina(f"Compute {n} plus {7 * n + 1}.", f"It is \\boxed{{{8 * n + 1}}}.") for n in range(440)]
    bad = {
        "no_answer": [numina(f"Prove that {n} is less than {n + 1}.", "Obvious.") for n in range(10)],
        "long_answer": [numina(f"Describe number {n}.", f"\\boxed{{{'a very long text ' * 6}{n}}}") for n in range(10)],
        "long_solution": [numina(f"Compute {n} squared.", f"{'word ' * 2000}\\boxed{{{n * n}}}") for n in range(10)],
        "leaked": [numina(LEAKED.format(n).replace("?", " ?").upper(), f"\\boxed{{{n}}}") for n in range(10)],
        "duplicate": [numina(f"Compute  {n}  plus {7 * n + 1} .", f"\\boxed{{{8 * n + 1}}}") for n in range(10)],
        "many_answers": [numina(f"Which is it, {n}?", f"\\boxed{{{n}}} or \\boxed{{{n + 1}}}") for n in range(10)],
    }
    # duplicates stand behind what they repeat; the others anywhere
    order = [("kept", row) for row in rows] + [(why, row) for why in bad if why != "duplicate" for row in bad[why]]
    random.Random(0).shuffle(order)
    order += [("duplicate", row) for row in bad["duplicate"]]
    places: dict[str, set[int]] = {}
    for number, (why, _) in enumerate(order, start=1):
        places.setdefault(why, set()).add(number)
    return [row for _, row in order], places


@pytest.fixture
def files(tmp_path):
    rows, places = made_rows()
    (tmp_path / "numina.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "evaluation.jsonl").write_text(
        "".join(json.dumps({"problem": LEAKED.format(n), "answer": str(n)}) + "\n" for n in range(10))
    )
    return tmp_path, places


def run(folder, **changes) -> dict:
    arguments = {"against": [str(folder / "evaluation.jsonl")], "held_out": 0.1, "console": Console(quiet=True)}
    return prepare([str(folder / "numina.jsonl")], folder / "prompts.parquet", **arguments | changes)


def test_exactly_the_rows_that_must_fall_out_do_and_the_report_says_why(files):
    folder, places = files
    report = run(folder)
    assert report["kept"] == 440
    assert report["fell_out"] == dict.fromkeys(
        ("no_answer", "many_answers", "long_answer", "long_solution", "leaked", "duplicate"), 10
    )
    for reason, examples in report["examples"].items():
        for example in examples:
            assert int(example.split(":")[1]) in places[reason]
    assert any("evaluation" in example for example in report["examples"]["leaked"])
    assert lines_of(report)[0] == f"440 prompts kept, {report['held_out']} of them held out"
    assert json.loads(Outputs(folder / "prompts.parquet").report.read_text()) == report


def test_what_is_written_is_read_as_prompts_and_split_by_content(files):
    folder, _ = files
    run(folder)
    write_tokenizer(folder, 50)
    tokenizer = load_tokenizer(folder)
    options = {"vocab_size": 50, "max_prompt_tokens": 99, "too_long": "error", "require_answer": True}
    outputs = Outputs(folder / "prompts.parquet")
    train, held_out = (
        {prompt.text: prompt.answer for prompt in load_prompts(path, tokenizer, **options).prompts}
        for path in (outputs.prompts, outputs.held_out)
    )
    assert len(train) + len(held_out) == 440
    assert 20 < len(held_out) < 70
    assert train.keys().isdisjoint(held_out)
    assert (train | held_out)["Compute 5 plus 36."] == "41"
    # a file in another order, with other neighbours, is split alike
    lines = (folder / "numina.jsonl").read_text().splitlines()[:200][::-1]
    (folder / "numina.jsonl").write_text("\n".join(lines))
    run(folder)
    again = {prompt.text for prompt in load_prompts(outputs.held_out, tokenizer, **options).prompts}
    assert again <= held_out.keys()


def test_only_what_this_command_wrote_is_replaced(files):
    folder, _ = files
    run(folder)
    run(folder)
    report = folder / "prompts.report.json"
    report.write_text('{"mine": true}')
    with pytest.raises(UserError, match="this command did not write it"):
        run(folder)
    assert json.loads(report.read_text()) == {"mine": True}
    with pytest.raises(UserError, match=r"must end in \.parquet"):
        prepare(
            [str(folder / "numina.jsonl")], folder / "p.json", against=(), held_out=0.0, console=Console(quiet=True)
        )


def test_copies_differ_in_spacing_case_and_latex_and_neighbours_are_no_copies():
    question = "Let $\\frac{a}{b}$ be the fraction in lowest terms that equals $0.125$. What is a + b in total?"
    overlap = Overlap([("one", question), ("short", "What is 2 + 2?")])
    assert overlap.with_which(question.upper().replace("\\FRAC", "\\dfrac").replace("  ", " ")) == "one"
    assert overlap.with_which("what is 2+2 ?") == "short"
    assert overlap.with_which("What is 2 + 3?") is None
    assert (
        overlap.with_which("Let n be the number of ways to choose three of the seven colours. What is n in total?")
        is None
    )
    assert Counter(map(overlap.with_which, [""])) == {None: 1}
