"""What falls out of a published file, and why: 500 rows in NuminaMath-CoT's format, 60 of them for six reasons."""

from __future__ import annotations

import json
import random
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console

from megatron_powerflow.data.overlap import Overlap
from megatron_powerflow.data.prompts import load_prompts
from megatron_powerflow.data.tokenizer import load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.prepare import NUMINA, Outputs, lines_of, named_files, prepare
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
    data = {"reasoning": [str(folder / "numina.jsonl")]}
    return prepare(data, folder / "prompts.parquet", **arguments | changes)


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
    fallen = [json.loads(line) for line in Outputs(folder / "prompts.parquet").fell_out.read_text().splitlines()]
    found: dict[str, set[int]] = {}
    for row in fallen:
        found.setdefault(row["reason"], set()).add(int(row["row"].split(":")[1]))
    assert found == {reason: rows for reason, rows in places.items() if reason != "kept"}
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
    foreign = folder / "prompts-held_out.parquet"
    parquet.write_table(pyarrow.table({"mine": [1, 2]}), foreign)
    with pytest.raises(UserError, match="this command did not write it"):
        run(folder)
    assert parquet.read_table(foreign).column_names == ["mine"]
    foreign.unlink()
    report = folder / "prompts.report.json"
    report.write_text('{"mine": true}')
    with pytest.raises(UserError, match="this command did not write it"):
        run(folder)
    assert json.loads(report.read_text()) == {"mine": True}
    with pytest.raises(UserError, match=r"must end in \.parquet"):
        prepare(
            {"reasoning": [str(folder / "numina.jsonl")]},
            folder / "p.json",
            against=(),
            held_out=0.0,
            console=Console(quiet=True),
        )


def test_copies_differ_in_spacing_case_and_latex_and_neighbours_are_no_copies():
    question = "Let $\\frac{a}{b}$ be the fraction in lowest terms that equals $0.125$. What is a + b in total?"
    overlap = Overlap([("one", question), ("short", "What is 2 + 2?")])
    assert overlap.overlapping_question(question.upper().replace("\\FRAC", "\\dfrac").replace("  ", " ")) == "one"
    assert overlap.overlapping_question("what is 2+2 ?") == "short"
    assert overlap.overlapping_question("What is 2 + 3?") is None
    assert (
        overlap.overlapping_question(
            "Let n be the number of ways to choose three of the seven colours. What is n in total?"
        )
        is None
    )
    assert Counter(map(overlap.overlapping_question, [""])) == {None: 1}


POEM = "\n".join(f"Line {n} of a poem about the sea" for n in range(6))
CREATIVE = {
    "poem": [{"poem": POEM}, {"content": POEM}, {"text": "Roses are red,\nviolets are blue."}, {"author": "nobody"}],
    "story": [
        {"snippet": "The train had left. Nobody waved. " + "It rained on and on. " * 40},
        {"snippet": "One sentence and no more."},
        {"text": "'Who is there?' she asked. Nobody answered, for the house had been empty for years."},
    ],
    "joke": [
        {"title": "Why did the scarecrow win a prize?", "selftext": "He was outstanding in his field."},
        {"joke": "I only know 25 letters of the alphabet. I don't know y."},
        {"joke": "No point here"},
        {"title": "What is this?", "selftext": ["no text"]},
    ],
}


def creative_files(folder, rows=CREATIVE) -> dict[str, list[str]]:
    for task, given in rows.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return {task: [str(folder / f"{task}.jsonl")] for task in rows}


def test_poems_stories_and_jokes_become_prompts_that_leave_something_to_write(tmp_path):
    quiet = Console(quiet=True)
    report = prepare(creative_files(tmp_path), tmp_path / "c.parquet", against=(), held_out=0.0, console=quiet)
    found = parquet.read_table(tmp_path / "c.parquet").to_pylist()
    asked = {task: [row["question"] for row in found if row["task"] == task] for task in CREATIVE}
    assert asked["poem"] == ["Continue this poem:\n\n" + "\n".join(POEM.splitlines()[:4])]
    assert len(asked["story"]) == 2
    assert "Write a story that begins so: 'Who is there?' she asked." in asked["story"]
    assert all(len(question.split()) < 70 for question in asked["story"])
    assert set(asked["joke"]) == {
        "Finish this joke: Why did the scarecrow win a prize?",
        "Finish this joke: I only know 25 letters of the alphabet.",
    }
    assert report["fell_out"] == {"no_text": 1, "too_short": 3, "duplicate": 1, "unreadable": 1}
    assert all(row["answer"] is None for row in found)
    assert lines_of(report)[-1].startswith("no evaluation set was given")


def test_each_kind_keeps_so_many_whatever_the_order_of_the_rows(tmp_path):
    jokes = [{"setup": f"What is number {n}?", "punchline": "It."} for n in range(30)]
    chosen = []
    for rows in (jokes, jokes[::-1]):
        data = creative_files(tmp_path, {"joke": rows})
        quiet = Console(quiet=True)
        report = prepare(data, tmp_path / "c.parquet", against=(), held_out=0.0, each=10, console=quiet)
        assert report["fell_out"] == {"surplus": 20}
        chosen.append({row["id"] for row in parquet.read_table(tmp_path / "c.parquet").to_pylist()})
    assert len(chosen[0]) == 10
    assert chosen[0] == chosen[1]


def test_a_command_that_was_stopped_goes_on_behind_the_files_that_were_done(tmp_path, monkeypatch):
    from megatron_powerflow import prepare as module

    rows, _ = made_rows()
    names = []
    for part in range(3):
        names.append(tmp_path / f"part{part}.jsonl")
        names[-1].write_text("".join(json.dumps(row) + "\n" for row in rows[part * 170 : part * 170 + 170]))
    arguments = {"against": (), "held_out": 0.1, "console": Console(quiet=True)}
    data = {"reasoning": list(map(str, names))}
    whole = prepare(data, tmp_path / "whole.parquet", **arguments)
    read, opened = module.read_file, []

    def until_the_third(path, violations):
        opened.append(path.name)
        if path.name == "part2.jsonl" and len(opened) == 3:
            raise KeyboardInterrupt
        return read(path, violations)

    monkeypatch.setattr(module, "read_file", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "p.parquet", **arguments)
    assert not (tmp_path / "p.parquet").exists()
    assert prepare(data, tmp_path / "p.parquet", **arguments) == whole
    assert opened == ["part0.jsonl", "part1.jsonl", "part2.jsonl", "part2.jsonl"]
    assert not (tmp_path / "p.partial.json").exists()
    assert parquet.read_table(tmp_path / "p.parquet").equals(parquet.read_table(tmp_path / "whole.parquet"))
    # changed files are read anew; what is not of this command is left alone
    opened.clear()
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path / "p.parquet", **arguments)
    names[0].write_text(json.dumps(numina("What is 1 + 1?", "\\boxed{2}")) + "\n")
    prepare(data, tmp_path / "p.parquet", **arguments)
    assert opened[3:] == ["part0.jsonl", "part1.jsonl", "part2.jsonl"]
    (tmp_path / "p.partial.json").write_text("mine")
    with pytest.raises(UserError, match="did not write it"):
        prepare(data, tmp_path / "p.parquet", **arguments)


def test_the_commands_words_say_what_is_in_the_files():
    none = {"poem": (), "story": (), "joke": ()}
    assert named_files(["numina"], none) == {"reasoning": NUMINA}
    assert named_files(["numina", "a.jsonl"], none) == {"reasoning": ["a.jsonl"]}
    assert named_files(["a.jsonl", "b.jsonl"], none) == {"reasoning": ["a.jsonl", "b.jsonl"]}
    assert named_files(["creative"], none | {"joke": ["j.csv"]}) == {"joke": ["j.csv"]}
    for words, given in ((["creative"], none), (["creative", "a.csv"], none), (["a.csv"], none | {"joke": ["j.csv"]})):
        with pytest.raises(UserError, match="--poems"):
            named_files(words, given)


def test_the_same_files_read_as_something_else_start_anew(tmp_path, monkeypatch):
    from megatron_powerflow import prepare as module

    names = [tmp_path / f"{part}.jsonl" for part in range(2)]
    for part, path in enumerate(names):
        path.write_text(json.dumps({"text": f"One line of {part}. And a second one.\n" * 6}) + "\n")
    arguments = {"against": (), "held_out": 0.0, "console": Console(quiet=True)}
    read = module.read_file

    def stopped_at_the_second(path, violations):
        if path == names[1]:
            raise KeyboardInterrupt
        return read(path, violations)

    monkeypatch.setattr(module, "read_file", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare({"poem": list(map(str, names))}, tmp_path / "c.parquet", **arguments)
    monkeypatch.setattr(module, "read_file", read)
    prepare({"joke": list(map(str, names))}, tmp_path / "c.parquet", **arguments)
    assert {row["task"] for row in parquet.read_table(tmp_path / "c.parquet").to_pylist()} == {"joke"}
