"""Which question, and which gold answer, does a row of a published benchmark hold?

There is one function for each format, which reads the columns as published. Behind each format stands where its columns
were seen:

    math500         HuggingFaceH4/MATH-500: problem, solution, answer, subject, level, unique_id
                    (cards of its copies on the hub, which list their features)
    aime24          HuggingFaceH4/aime_2024: id, problem, solution, answer, url, year (its card)
    aime25          opencompass/AIME2025: question, answer; math-ai/aime25: problem, answer, id (code that loads them)
    amc23           math-ai/amc23: id, question, answer (27.0 for 27), url (code that loads it; a copy's card)
    olympiadbench   Hothan/OlympiadBench: id, question, context, final_answer (list), is_multiple_answer, unit,
                    answer_type, error, image_1, ... (a row on EvalScope's page of olympiad_bench)
    gpqa            Idavidrein/gpqa: Question, Correct Answer, Incorrect Answer 1, 2 and 3, Record ID (its card)
    numina          AI-MO/NuminaMath-CoT: source, problem, solution (ending in a box), messages (a copy's card)
    math            any question or problem with an answer, and openai/gsm8k: question, answer (ending in #### 42);
                    the task is called as the file is

Left out: files (`data/rows.py`), the hub (`hub/`), prompts of the user's own and what all formats share
(`questions.py`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from megatron_powerflow.data.boxes import last_boxed
from megatron_powerflow.data.rows import Row
from megatron_powerflow.data.text_fields import text_of
from megatron_powerflow.errors import UserError

# the wording of EMPO (github.com/QingyangZhang/EMPO), whose recipe the paper follows
MATH_SUFFIX = "Let's think step by step and output the final answer within \\boxed{}."
CHOICE_SUFFIX = "Let's think step by step and output the letter of the final answer within \\boxed{}."
LETTERS = "ABCD"
GPQA_COLUMNS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True, slots=True)
class Problem:
    """Holds the question of a row, as text without a suffix, and its gold answer."""

    text: str
    answer: str
    id: str | None  # the data set's own
    tolerance: float | None = None  # numbers this near to the answer are right too


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Says how files of a published format are recognised and how their rows are read.

    detect: whether a file with these columns and this path, in lower case, looks like the format. read: returns the
    problem of a row; None for a row whose answer cannot be given or compared; raises UserError, without the row's
    location, for a row that is not of the format.
    """

    detect: Callable[[set[str], str], bool]
    read: Callable[[Row], Problem | None]
    suffix: str = MATH_SUFFIX


def read_math500(row: Row) -> Problem:
    """Reads a row of MATH-500."""
    return Problem(_text(row, "problem"), _text(row, "answer"), _identity(row, "unique_id"))


def read_aime(row: Row) -> Problem:
    """Reads a row of AIME, whose answer is a whole number from 0 to 999."""
    return Problem(_text(row, "problem" if "problem" in row else "question"), _aime_answer(row), _identity(row, "id"))


def read_amc(row: Row) -> Problem:
    """Reads a row of AMC, whose answer is a number: 27.0 is 27."""
    return Problem(_text(row, "question"), _plain_number(_text(row, "answer")), _identity(row, "id"))


def read_olympiadbench(row: Row) -> Problem | None:
    """Reads a row of OlympiadBench; None for proofs and for questions about a picture.

    Several answers become one, separated by commas; their order does not matter.
    """
    answers = row.get("final_answer") or []
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise UserError(f"final_answer must be a list of texts, got {row['final_answer']!r:.60}")
    pictured = any(re.fullmatch(r"image_\d+", name) for name in row)
    if not answers or pictured or row.get("answer_type") == "Need_human_evaluate":
        return None
    if len(answers) > 1 and not row.get("is_multiple_answer"):
        raise UserError(f"final_answer has {len(answers)} entries, but is_multiple_answer is not true")
    text = _text(row, "question")
    if isinstance(row.get("context"), str) and row["context"].strip():
        text = f"{row['context'].strip()}\n{text}"
    if isinstance(row.get("unit"), str) and row["unit"].strip():
        text += f"\nThe answer is in {row['unit'].strip()}; leave the unit out.\n"
    answer = ", ".join(re.sub(r"(?<!\\)\$", "", answer).strip() for answer in answers)
    return Problem(text, answer, _identity(row, "id"), _tolerance(row.get("error")))


def read_gpqa(row: Row) -> Problem:
    """Reads a row of GPQA. The order of the choices depends only on their texts and the question's."""
    question = _text(row, "Question")
    choices = [(name, _text(row, name)) for name in GPQA_COLUMNS]
    choices.sort(key=lambda choice: hashlib.sha256(f"{question}\0{choice[1]}".encode()).digest())
    lines = [f"{letter}. {choice}\n" for letter, (_, choice) in zip(LETTERS, choices, strict=True)]
    gold = next(index for index, (name, _) in enumerate(choices) if name == GPQA_COLUMNS[0])
    return Problem(f"{question}\n\n{''.join(lines)}", LETTERS[gold], _identity(row, "Record ID"))


def read_numina(row: Row) -> Problem | None:
    """Reads a row of NuminaMath; None for a solution without a box, which is a proof most often."""
    answer = last_boxed(_text(row, "solution"))
    return None if answer is None else Problem(_text(row, "problem"), answer, None)


def read_math(row: Row) -> Problem:
    """Reads a question or problem with a short answer, or with an answer behind the #### of GSM8K."""
    answer = _text(row, "answer").rpartition("####")[2].strip()
    if not answer or len(answer) > 200 or "\n" in answer:
        raise UserError(f"answer must be short, on one line, and nothing but the answer, got {answer!r:.60}")
    return Problem(_text(row, "problem" if "problem" in row else "question"), answer, _identity(row, "id"))


# Detected in this order: formats that few columns tell apart come last.
BENCHMARKS = {
    "gpqa": Benchmark(lambda c, _: {"Question", *GPQA_COLUMNS} <= c, read_gpqa, CHOICE_SUFFIX),
    "olympiadbench": Benchmark(lambda c, _: {"question", "final_answer"} <= c, read_olympiadbench),
    "math500": Benchmark(lambda c, _: {"problem", "answer", "subject", "level"} <= c, read_math500),
    "aime24": Benchmark(lambda c, _: {"problem", "answer", "url", "year"} <= c, read_aime),
    "numina": Benchmark(lambda c, _: {"problem", "solution", "source"} <= c and "answer" not in c, read_numina),
    "amc23": Benchmark(lambda c, _: {"id", "question", "answer", "url"} <= c, read_amc),
    "aime25": Benchmark(lambda c, path: _asks(c) and re.search(r"aime_?(20)?25", path) is not None, read_aime),
    "math": Benchmark(lambda c, _: _asks(c), read_math),
}


def _asks(columns: set[str]) -> bool:
    return "answer" in columns and bool(columns & {"question", "problem"})


def _text(row: Row, name: str) -> str:
    """Returns a text or number of the row, as text. Raises UserError where it is missing or empty."""
    value = row.get(name)
    text = text_of(value, name)
    if text is None:
        raise UserError(
            f"{name} is empty" if isinstance(value, str) else f"{name} must be a text or a number, got {value}"
        )
    return text


def _identity(row: Row, name: str) -> str | None:
    return text_of(row.get(name), name)


def _aime_answer(row: Row) -> str:
    """Returns a whole number from 0 to 999, as text: 025 is 25. One published answer is in degrees (336^\\circ in
    opencompass/AIME2025)."""
    answer = _text(row, "answer")
    number = _plain_number(re.sub(r"\^\{?\\circ\}?$", "", answer.strip("$").strip()))
    if not re.fullmatch(r"\d{1,3}", number):
        raise UserError(
            f"answer must be a whole number from 0 to 999, got {answer!r:.60}; is this AIME? name the format"
        )
    return number


def _plain_number(text: str) -> str:
    """Writes 27.0 and 027 as 27, and leaves a text that is no decimal number as it is."""
    if not re.fullmatch(r"[-+]?\d{1,40}(\.\d{0,40})?", text):
        return text
    number = Fraction(text)
    return str(number.numerator) if number.denominator == 1 else text


def _tolerance(error: object) -> float | None:
    """Returns OlympiadBench's `error`, an absolute tolerance such as "1e-1"; None for several, one per answer."""
    try:
        value = float(error) if isinstance(error, str | float | int) else 0.0
    except ValueError:
        return None
    return value if 0 < value < math.inf else None
