"""Every published format, read from small files of our own writing; bad rows are reported by their place."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.questions import load_questions
from megatron_powerflow.evaluation.readers import CHOICE_SUFFIX, MATH_SUFFIX

MATH500 = [
    {
        "problem": "What is $2+2$?",
        "solution": "It is $\\boxed{4}$.",
        "answer": "4",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/algebra/1.json",
    },
    {
        "problem": "Half of one?",
        "solution": "$\\boxed{\\frac12}$",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "test/algebra/2.json",
    },
]
AIME24 = [
    {
        "id": 60,
        "problem": "Find n.",
        "solution": "...",
        "answer": "025",
        "url": "https://example.org/1",
        "year": "2024",
    },
    {
        "id": 61,
        "problem": "Find m.",
        "solution": "...",
        "answer": "204",
        "url": "https://example.org/2",
        "year": "2024",
    },
]
AIME25_QUESTION = [{"question": "Sum of all b?", "answer": "70"}, {"question": "Arcs?", "answer": "336^\\circ"}]
AIME25_PROBLEM = [{"problem": "Sum of all b?", "answer": "70", "id": "0"}, {"problem": "m?", "answer": 7, "id": "1"}]
AMC23 = [
    {"id": 0, "question": "How far?", "answer": 27.0, "url": "https://example.org/a"},
    {"id": 1, "question": "How many?", "answer": "0.5", "url": "https://example.org/b"},
]
OLYMPIAD_ROW = {
    "subfield": "Algebra",
    "context": None,
    "solution": ["..."],
    "unit": None,
    "error": None,
    "image_1": None,
}
OLYMPIAD = [
    {
        **OLYMPIAD_ROW,
        "id": 1606,
        "question": "Find all x.",
        "final_answer": ["$-1$, $3$"],
        "is_multiple_answer": True,
        "answer_type": "Numerical",
    },
    {
        **OLYMPIAD_ROW,
        "id": 1607,
        "question": "How heavy?",
        "context": "A ball rolls.",
        "final_answer": ["$2.5$"],
        "is_multiple_answer": False,
        "unit": "kg",
        "answer_type": "Numerical",
        "error": "1e-1",
    },
    {**OLYMPIAD_ROW, "id": 1608, "question": "Prove it.", "final_answer": None, "is_multiple_answer": False},
    {**OLYMPIAD_ROW, "id": 1609, "question": "See <image_1>.", "final_answer": ["1"], "image_1": {"path": "1.jpg"}},
]
GPQA = [
    {
        "Question": f"Which particle is number {i}, according to\nthe table?",
        "Correct Answer": "the muon",
        "Incorrect Answer 1": "the pion",
        "Incorrect Answer 2": "the kaon, or so",
        "Incorrect Answer 3": 'the "other" one',
        "Record ID": f"rec{i}",
    }
    for i in range(24)
]
NUMINA = [
    {
        "source": "olympiads",
        "problem": "Compute.",
        "solution": "First \\boxed{1}, no: \\boxed{\\sqrt{2}}.",
        "messages": [{"role": "user", "content": "Compute."}],
    },
    {
        "source": "olympiads",
        "problem": "Prove.",
        "solution": "Clear.",
        "messages": [{"role": "user", "content": "Prove."}],
    },
]


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def content(question) -> str:
    (message,) = question.prompt["messages"]
    assert message["role"] == "user"
    return message["content"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "task", "ids", "answers"),
    [
        (MATH500, "math500", ["test/algebra/1.json", "test/algebra/2.json"], ["4", "\\frac{1}{2}"]),
        (AIME24, "aime24", ["60", "61"], ["25", "204"]),
        (AMC23, "amc23", ["0", "1"], ["27", "0.5"]),
        (NUMINA, "numina", ["file:1"], ["\\sqrt{2}"]),
    ],
    ids=["math500", "aime24", "amc23", "numina"],
)
def test_a_published_format_is_known_by_its_columns_in_every_kind_of_file(tmp_path, rows, task, ids, answers, suffix):
    if suffix == ".parquet":
        rows = [{key: str(value) if key == "answer" else value for key, value in row.items()} for row in rows]
    loaded = load_questions([write(tmp_path / f"file{suffix}", rows)])
    assert [question.task for question in loaded.questions] == [task] * len(ids)
    if suffix == ".csv":  # the first line names the columns
        ids = [re.sub(r"^file:(\d)", lambda found: f"file:{int(found[1]) + 1}", name) for name in ids]
    assert [question.id for question in loaded.questions] == ids
    assert [question.answer for question in loaded.questions] == answers
    text = rows[0].get("problem") or rows[0]["question"]
    assert content(loaded.questions[0]) == f"{text} {MATH_SUFFIX}"
    assert loaded.num_left_out == len(rows) - len(ids)


def test_aime25_is_known_by_the_name_of_its_file_or_folder(tmp_path):
    """Its columns are everybody's."""
    (tmp_path / "math-ai--aime25").mkdir()
    paths = [
        write(tmp_path / "aime2025-I.jsonl", AIME25_QUESTION),
        write(tmp_path / "math-ai--aime25" / "test.jsonl", AIME25_PROBLEM),
    ]
    questions = load_questions(paths).questions
    assert [(q.id, q.task, q.answer) for q in questions] == [
        ("aime2025-I:1", "aime25", "70"),
        ("aime2025-I:2", "aime25", "336"),
        ("0", "aime25", "70"),
        ("1", "aime25", "7"),
    ]


def test_any_question_with_a_short_answer_is_a_task_named_after_its_file(tmp_path):
    rows = [{"question": "2 + 3?", "answer": "2 and 3\nare #### 5"}, {"question": "Pi?", "answer": "\\pi", "id": "x"}]
    questions = load_questions([write(tmp_path / "mine.jsonl", rows)]).questions
    assert [(q.id, q.task, q.answer) for q in questions] == [("mine:1", "mine", "5"), ("x", "mine", "\\pi")]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_olympiadbench_keeps_what_can_be_compared(tmp_path, suffix):
    loaded = load_questions([write(tmp_path / f"OE{suffix}", OLYMPIAD)])
    several, measured = loaded.questions
    assert loaded.num_left_out == 2  # a proof and a picture
    assert (several.id, several.answer, several.tolerance) == ("1606", "-1, 3", None)
    assert (measured.id, measured.answer, measured.tolerance) == ("1607", "2.5", 0.1)
    assert content(measured).startswith("A ball rolls.\nHow heavy?\nThe answer is in kg; leave the unit out.\n")


def test_gpqa_choices_are_shuffled_by_question_and_the_answer_is_the_letter(tmp_path):
    path = write(tmp_path / "gpqa_diamond.csv", GPQA)
    first, again = load_questions([path]).questions, load_questions([path]).questions
    assert first == again
    assert {question.answer for question in first} == set("ABCD")
    for question in first:
        text = content(question)
        (line,) = [line for line in text.splitlines() if line.startswith(f"{question.answer}. ")]
        assert line == f"{question.answer}. the muon"
        assert text.endswith(f"\n{CHOICE_SUFFIX}")
        assert all(row in text for row in ("the pion", "the kaon, or so", 'the "other" one'))
    backwards = load_questions([write(tmp_path / "reversed.csv", GPQA[::-1])]).questions
    assert {q.id: q.answer for q in backwards} == {q.id: q.answer for q in first}


def test_prompts_of_our_own_are_taken_as_they_are(tmp_path):
    rows = [
        {"prompt": "1 + 1 =", "answer": 2, "task": "sums", "id": "a"},
        {"messages": [{"role": "user", "content": "A poem."}], "task": "poem"},
        {"prompt_token_ids": [5, 6], "answer": "7"},
    ]
    questions = load_questions([write(tmp_path / "mine.jsonl", rows)]).questions
    assert [(q.id, q.task, q.answer) for q in questions] == [
        ("a", "sums", "2"),
        ("1", "poem", None),
        ("2", "mine", "7"),
    ]
    assert [q.prompt for q in questions] == [
        {"prompt": "1 + 1 ="},
        {"messages": rows[1]["messages"]},
        {"prompt_token_ids": [5, 6]},
    ]


def test_the_suffix_and_the_form_of_the_prompt_are_options(tmp_path):
    path = write(tmp_path / "test.jsonl", MATH500)
    assert load_questions([path], suffix="Answer:", prompt_as="text").questions[0].prompt == {
        "prompt": "What is $2+2$? Answer:"
    }
    assert content(load_questions([path], suffix="").questions[0]) == "What is $2+2$?"


def test_several_files_are_several_tasks(tmp_path):
    paths = [write(tmp_path / "a.jsonl", MATH500), write(tmp_path / "b.jsonl", AMC23)]
    assert [q.task for q in load_questions(paths).questions] == ["math500"] * 2 + ["amc23"] * 2


def violations_of(*paths: str, **options) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_questions(paths, **options)
    return caught.value.violations


def test_bad_rows_are_named_by_their_lines_all_at_once(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [MATH500[0], {**MATH500[1], "answer": None}, {**MATH500[1], "problem": " "}, MATH500[0]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"problem": \n[1]\n')
    found = violations_of(str(path))
    assert [item.split(": ")[0] for item in found] == [f"{path}:{n}" for n in (5, 6, 2, 3, 4)]
    assert "answer must be a text or a number, got None" in found[2]
    assert "problem is empty" in found[3]
    assert f"is that of {path}:1 too" in found[4]


def test_a_csv_row_is_named_by_the_first_of_its_lines(tmp_path):
    path = write(tmp_path / "gpqa.csv", GPQA[:3])  # two lines a row: the questions hold a line break
    Path(path).write_text(Path(path).read_text() + '"Short\nrow","x"\n')
    rows = [{**GPQA[0], "Correct Answer": ""}, GPQA[1]]
    assert violations_of(path) == (f"{path}:8: not as many fields as the 6 columns",)
    other = write(tmp_path / "other.csv", rows)
    assert violations_of(other) == (f"{other}:2: Correct Answer must be a text or a number, got None",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.jsonl", None, "no such file"),
        ("data.txt", "x", "its name ends in .txt"),
        ("empty.jsonl", "", "no rows in it"),
        ("empty.csv", "", "empty; the first line"),
        ("list.json", "[1, ", "not a JSON list that can be read"),
        ("deep.json", "[" * 100_000, "not a JSON list that can be read"),
        ("list.json", "[1]", "must be a JSON object, got int"),
        ("columns.jsonl", '{"foo": 1, "bar": 2}', "columns bar, foo are those of no known format"),
        ("digits.jsonl", '{"question": "q", "answer": ' + "9" * 5000 + "}", "not a line of JSON"),
        ("aime25.jsonl", '{"question": "q", "answer": "6 * 7 = 42"}', "whole number from 0 to 999"),
        ("long.jsonl", '{"question": "q", "answer": "First,\\nthen 42."}', "answer must be short"),
        ("nan.jsonl", '{"question": "q", "answer": NaN, "url": "u"}', "answer must be a text or a number, got nan"),
        ("half.jsonl", '{"question": "\\ud800", "answer": 1}', "half of a surrogate pair"),
        ("half.json", '[{"question": "\\ud800", "answer": 1}]', "half of a surrogate pair"),
        ("bool.jsonl", '{"question": "q", "answer": true, "url": "u"}', "must be a text or a number, got True"),
        ("o.jsonl", '{"question": "q", "final_answer": [["$2$"]]}', "final_answer must be a list of texts"),
        ("o.jsonl", '{"question": "q", "final_answer": ["1", "2"]}', "is_multiple_answer is not true"),
        ("n.jsonl", '{"source": "s", "problem": "p", "solution": "no box"}', "all 1 rows ask for proofs"),
        ("quotes.csv", 'question,answer\n"a"b,1\n', "not a CSV file that can be read"),
        ("binary.csv", "question,answer\n\udcff,1\n", "not a CSV file that can be read"),
        ("not.parquet", "PAR1", "not a parquet file that can be read"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
    (found,) = violations_of(str(path))
    assert message in found


def test_options_without_effect_are_refused(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"prompt": "x"}])
    assert len(violations_of(path, suffix="Answer:", prompt_as="text")) == 2
    assert "unknown; known are gpqa" in violations_of(path, format="mmlu")[0]


def test_a_named_format_is_not_guessed_again(tmp_path):
    path = write(tmp_path / "test.jsonl", AIME25_QUESTION[:1])
    assert load_questions([path], format="aime25").questions[0].task == "aime25"
    assert "url" not in violations_of(path, format="math500")[0]
    assert "problem must be a text" in violations_of(path, format="math500")[0]
