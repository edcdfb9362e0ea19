"""`powerflow prepare`: published files in, prompts for training and held-out ones out, with a report of what fell out.

    OUT                         parquet: id, task, question, answer, source
    OUT's name -held_out        the held-out share, the same columns
    OUT's name .report.json     counts by reason, and the first rows of each
    OUT's name .fell_out.jsonl  every row that fell out: where it stands, the reason, what exactly
    OUT's name .partial.json    while it runs: what the files that are done have given

Input files are read one after the other. A command that was stopped goes on behind the last file that was done, if its
arguments and the files' contents are the same; else it starts anew.

Left out: the rules (`data/preparation.py`, `data/creative_preparation.py`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

from rich.console import Console

from megatron_powerflow.commands.rounds import progress_bar
from megatron_powerflow.data.creative_preparation import INSTRUCTIONS, CreativePreparation
from megatron_powerflow.data.overlap import Overlap
from megatron_powerflow.data.preparation import REASONS, Preparation, content_key, is_held_out
from megatron_powerflow.data.rows import read_file
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.questions import load_questions
from megatron_powerflow.hub.located import NO_DOWNLOADS, LocalPaths
from megatron_powerflow.targets import file_refusals, require, starts_with_line_of
from megatron_powerflow.whole_files import ordinary, write_file

NUMINA = tuple(f"hf://AI-MO/NuminaMath-CoT/data/train-{part:05}-of-00005.parquet" for part in range(5))
EACH = 100  # of poems, stories and jokes; the paper has 300 prompts
EXAMPLES = 3  # rows named in the report, of each reason
MADE_BY = "powerflow prepare"
REPORT_START = b'{\n  "made_by": "powerflow prepare"'
FALLEN = ("row", "reason", "detail")  # row: file:number, counted as `read_file` does
PARTIAL_START = b'{"made_by": "powerflow prepare"'


class Limits(TypedDict, total=False):
    """The limits of a `Preparation`, in characters."""

    max_answer: int
    max_solution: int


class Judge(Protocol):
    """Judges rows of one task. judge: returns ("kept", "") or (a reason of REASONS, the detail); prepared_row:
    returns what a kept row becomes; seen: ids of the rows kept so far."""

    seen: set[bytes]

    def judge(self, row: Mapping[str, Any]) -> tuple[str, str]: ...

    def prepared_row(self, row: Mapping[str, Any]) -> dict[str, str]: ...


@dataclass(frozen=True)
class Outputs:
    """The files that a preparation writes, all named after `prompts`."""

    prompts: Path

    @property
    def held_out(self) -> Path:
        """Return the path of the held-out prompts."""
        return self.prompts.with_name(f"{self.prompts.stem}-held_out{self.prompts.suffix}")

    @property
    def report(self) -> Path:
        """Return the path of the report."""
        return self.prompts.with_name(f"{self.prompts.stem}.report.json")

    @property
    def fell_out(self) -> Path:
        """Return the path of the rows that fell out."""
        return self.prompts.with_name(f"{self.prompts.stem}.fell_out.jsonl")

    @property
    def partial(self) -> Path:
        """Return the path of what an unfinished command has read."""
        return self.prompts.with_name(f"{self.prompts.stem}.partial.json")

    def refusals(self) -> list[str]:
        """Return why these files may not be written, a sentence each; [] when they may."""
        if self.prompts.suffix != ".parquet":
            return [f"--out {self.prompts}: must end in .parquet"]
        if importlib.util.find_spec("pyarrow") is None:
            return [f"--out {self.prompts}: writing parquet needs pyarrow; pip install pyarrow"]
        if not self.prompts.parent.is_dir():
            return [f"--out {self.prompts}: {self.prompts.parent} is no folder; make it first, or write elsewhere"]
        refusals = []
        for path in (self.prompts, self.held_out):
            refusals += file_refusals(path, functools.partial(_is_ours, path))
        refusals += file_refusals(self.report, lambda start: start.startswith(REPORT_START))
        refusals += file_refusals(self.fell_out, starts_with_line_of(FALLEN))
        return refusals + file_refusals(self.partial, lambda start: start.startswith(PARTIAL_START))


@dataclass
class PreparedRows:
    """The rows read so far. done: SHA-256 of each finished file, in order; fallen: as in OUT's name .fell_out.jsonl."""

    done: list[str] = field(default_factory=list)
    kept: list[dict[str, str]] = field(default_factory=list)
    fallen: list[dict[str, str]] = field(default_factory=list)

    def fell_out(self, row: str, reason: str, detail: str = "") -> None:
        """Note a row that fell out. row: what the report calls it; reason: of REASONS."""
        self.fallen.append({"row": row, "reason": reason, "detail": detail})

    def counts(self) -> dict[str, int]:
        """Count the rows that fell out by reason, in the order of REASONS."""
        counts = Counter(row["reason"] for row in self.fallen)
        return {reason: counts[reason] for reason in REASONS if counts[reason]}

    def examples(self) -> dict[str, list[str]]:
        """Return the first EXAMPLES rows that fell out, for each reason."""
        examples_by_reason: dict[str, list[str]] = {reason: [] for reason in self.counts()}
        for row in self.fallen:
            if len(examples_by_reason[row["reason"]]) < EXAMPLES:
                examples_by_reason[row["reason"]].append(": ".join(filter(None, (row["row"], row["detail"]))))
        return examples_by_reason


def prepare(
    data: Mapping[str, Sequence[str]],
    out: Path,
    *,
    against: Sequence[str],
    held_out: float,
    each: int = EACH,
    located: LocalPaths = NO_DOWNLOADS,
    console: Console,
    **limits: Unpack[Limits],
) -> dict[str, Any]:
    """Write the prompts of `data`, those held out and a report; returns the report.

    data: names of files by task, "reasoning" or those of INSTRUCTIONS. against: evaluation sets of which no prompt
    may be. held_out: a share in [0, 1]. each: the most prompts of one creative kind. located: the files of names on
    the hub. Raises UserError when a file cannot be read, the outputs may not be written, or no row is left.
    """
    outputs = Outputs(out)
    require(outputs.refusals())
    questions = load_questions(against, located=located).questions if against else ()
    judges = _judges(Overlap((f"{q.task}/{q.id}", _text(q.prompt)) for q in questions), limits)
    files = [(task, path) for task, names in data.items() for name in names for path in located.files(name)]
    digests = {path: _digest(path) for _, path in files}
    read = [(task, digests[path]) for task, path in files]
    key = hashlib.sha256(repr((read, [q.prompt for q in questions], limits)).encode()).hexdigest()
    prepared = _continued(outputs.partial, key)
    if prepared.done:
        console.print(f"goes on behind {len(prepared.done)} of {len(files)} files that were done ({outputs.partial})")
    for row in prepared.kept:
        judges[row["task"]].seen.add(bytes.fromhex(row["id"]))
    with progress_bar(console, True) as bar:
        task_bar = bar.add_task("reading", total=len(files), completed=len(prepared.done))
        for task, path in files[len(prepared.done) :]:
            _read(path, judges[task], prepared)
            prepared.done.append(digests[path])
            if len(prepared.done) < len(files):
                state = {"made_by": MADE_BY, "key": key, **vars(prepared)}
                write_file(outputs.partial, json.dumps(state, ensure_ascii=False).encode())
            bar.advance(task_bar)
    kept = _chosen(prepared, each)
    if not kept:
        named = [name for names in data.values() for name in names]
        where = [f"such as {shown[0]}" for shown in prepared.examples().values()]
        raise UserError([f"{', '.join(named)}: no row is left", *_reasons(prepared.counts()), *where])
    report = {
        "made_by": MADE_BY,
        "data": {str(path): digest for path, digest in digests.items()},
        "against": list(against),
        **({"revisions": located.revisions} if located.revisions else {}),
        "kept": len(kept),
        "held_out": sum(is_held_out(row["question"], held_out) for row in kept),
        "fell_out": prepared.counts(),
        "examples": prepared.examples(),
    }
    _write_all(outputs, kept, held_out, prepared, report)
    return report


def _write_all(
    outputs: Outputs, kept: Sequence[dict[str, str]], held_out: float, prepared: PreparedRows, report: dict[str, Any]
) -> None:
    parts: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for row in kept:
        parts[is_held_out(row["question"], held_out)].append(row)
    _write(outputs.prompts, parts[False])
    _write(outputs.held_out, parts[True])
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in prepared.fallen)
    write_file(outputs.fell_out, "".join(lines).encode())
    write_file(outputs.report, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    outputs.partial.unlink(missing_ok=True)


def named_files(data: Sequence[str], creative: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Return names of files by task, from the words of the command. creative: those given as poems, stories and jokes.

    Raises UserError where the words do not go together.
    """
    first, *others = data
    given = {task: names for task, names in creative.items() if names}
    if first == "creative":
        if others:
            raise UserError(f"creative: what is in {', '.join(others)}? Give files by --poems, --stories and --jokes")
        if not given:
            raise UserError("creative: no files; give some by --poems, --stories or --jokes")
        return given
    if given:
        raise UserError("--poems, --stories and --jokes belong to: powerflow prepare creative --out OUT.parquet")
    if first == "numina":
        return {"reasoning": others or NUMINA}
    return {"reasoning": data}


def _judges(against: Overlap, limits: Limits) -> dict[str, Judge]:
    creative: set[bytes] = set()
    judges: dict[str, Judge] = {task: CreativePreparation(task, against, creative) for task in INSTRUCTIONS}
    return judges | {"reasoning": Preparation(against, **limits)}


def _read(path: Path, judge: Judge, prepared: PreparedRows) -> None:
    violations: list[str] = []
    for number, row in read_file(path, violations):
        reason, detail = judge.judge(row)
        if reason == "kept":
            prepared.kept.append(judge.prepared_row(row))
        else:
            prepared.fell_out(f"{path.name}:{number}", reason, detail)
    for violation in violations:  # which begins with file and row
        prepared.fell_out(violation, "unreadable")


def _chosen(prepared: PreparedRows, each: int) -> list[dict[str, str]]:
    """Return all reasoning prompts, and of every other kind the `each` with the first ids: hashes of their words."""
    taken: list[dict[str, str]] = []
    for task in ("reasoning", *INSTRUCTIONS):
        rows = [row for row in prepared.kept if row["task"] == task]
        if task != "reasoning" and len(rows) > each:
            rows.sort(key=lambda row: row["id"])
            for row in rows[each:]:
                prepared.fell_out(row["id"], "surplus", row["question"][:80])
            rows = rows[:each]
        taken += rows
    return taken


def _continued(path: Path, key: str) -> PreparedRows:
    """Return what an interrupted try of the same command left, or nothing."""
    try:
        state = json.loads(ordinary(path).read_bytes())
        if state["key"] != key:
            return PreparedRows()
        prepared = PreparedRows(state["done"], state["kept"], state["fallen"])
        tasks = ("reasoning", *INSTRUCTIONS)
        whole = all(content_key(row["question"]).hex() == row["id"] and row["task"] in tasks for row in prepared.kept)
        whole = whole and all(tuple(row) == FALLEN and row["reason"] in REASONS for row in prepared.fallen)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return PreparedRows()
    return prepared if whole else PreparedRows()


def _digest(path: Path) -> str:
    try:
        with ordinary(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _is_ours(path: Path, start: bytes) -> bool:
    """Whether a parquet file was written by this command. start: the file's first bytes."""
    from pyarrow import ArrowException, parquet

    if not start.startswith(b"PAR1"):
        return False
    try:
        return (parquet.read_schema(path).metadata or {}).get(b"made_by") == MADE_BY.encode()
    except (ArrowException, OSError, ValueError):
        return False


def _text(prompt: dict[str, Any]) -> str:
    return prompt["prompt"] if "prompt" in prompt else prompt["messages"][-1]["content"]


def lines_of(report: dict[str, Any]) -> list[str]:
    """Describe a report in lines for people."""
    lines = [f"{report['kept']} prompts kept, {report['held_out']} of them held out", *_reasons(report["fell_out"])]
    if not report["against"]:
        lines.append("no evaluation set was given: that no prompt is of one was not looked at (--against)")
    return lines


def _reasons(counts: Mapping[str, int]) -> list[str]:
    return [
        f"{count} {'row' if count == 1 else 'rows'} fell out: {REASONS[reason]}" for reason, count in counts.items()
    ]


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    names = ("id", "task", "question", "answer", "source")
    table = pyarrow.table({name: pyarrow.array([row.get(name) for row in rows], pyarrow.string()) for name in names})
    parquet.write_table(table.replace_schema_metadata({"made_by": MADE_BY}), buffer)
    write_file(path, buffer.getvalue())
