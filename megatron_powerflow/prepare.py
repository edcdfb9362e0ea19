"""`powerflow prepare`: a published file in, prompts for training and held-out ones out, with a report of what fell out.

    OUT                 parquet: id, task, question, answer, source
    OUT's name -held_out    the held-out share, the same columns
    OUT's name .report.json counts by reason, and the first rows of each

Input files are read one after the other; each that is done is kept beside OUT until the end, so that a command that was
stopped goes on with the next file.

Left out: the rules (`data/preparation.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_powerflow.data.overlap import Overlap
from megatron_powerflow.data.preparation import REASONS, Preparation, is_held_out, prepared
from megatron_powerflow.data.rows import read_file
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.questions import load_questions
from megatron_powerflow.hub.located import AS_NAMED, Located
from megatron_powerflow.output_lines import progress_bar
from megatron_powerflow.targets import file_refusals, require, write_file

EXAMPLES = 3  # rows named in the report, of each reason
REPORT_START = b'{\n  "made_by": "powerflow prepare"'


@dataclass(frozen=True)
class Outputs:
    """The files that a preparation writes."""

    prompts: Path

    @property
    def held_out(self) -> Path:
        return self.prompts.with_name(f"{self.prompts.stem}-held_out{self.prompts.suffix}")

    @property
    def report(self) -> Path:
        return self.prompts.with_name(f"{self.prompts.stem}.report.json")

    def refusals(self) -> list[str]:
        if self.prompts.suffix != ".parquet":
            return [f"--out {self.prompts}: must end in .parquet"]
        found = [text for path in (self.prompts, self.held_out) for text in file_refusals(path, _is_parquet)]
        return found + file_refusals(self.report, lambda start: start.startswith(REPORT_START))


def prepare(
    data: Sequence[str],
    out: Path,
    *,
    against: Sequence[str],
    held_out: float,
    located: Located = AS_NAMED,
    console: Console,
    **limits: int,
) -> dict[str, Any]:
    """Write the prompts of `data`; returns the report. Raises UserError.

    located: which of `data` and `against` are names on the hub, and where their files are.
    """
    outputs = Outputs(out)
    require(outputs.refusals())
    questions = load_questions(against, located=located).questions if against else ()
    judge = Preparation(Overlap((f"{q.task}/{q.id}", _text(q.prompt)) for q in questions), **limits)
    counts: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    kept: list[dict[str, str]] = []
    violations: list[str] = []
    files = [path for name in data for path in located.files(name)]
    with progress_bar(console, True) as bar:
        task = bar.add_task("reading", total=len(files))
        for path in files:
            for number, row in read_file(path, violations):
                reason, detail = judge.judge(row)
                counts[reason] += 1
                if reason == "kept":
                    kept.append(prepared(row))
                elif len(examples.setdefault(reason, [])) < EXAMPLES:
                    examples[reason].append(f"{path.name}:{number}" + (f": {detail}" if detail else ""))
            bar.advance(task)
    counts["unreadable"] += len(violations)
    examples.setdefault("unreadable", []).extend(violations[:EXAMPLES])
    if not kept:
        raise UserError([f"{', '.join(data)}: no row is left", *_reasons(counts)])
    parts = {True: [], False: []}
    for row in kept:
        parts[is_held_out(row["question"], held_out)].append(row)
    _write(outputs.prompts, parts[False])
    _write(outputs.held_out, parts[True])
    report = {
        "made_by": "powerflow prepare",
        "data": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "against": list(against),
        **({"revisions": located.revisions} if located.revisions else {}),
        "kept": len(kept),
        "held_out": len(parts[True]),
        "fell_out": {reason: counts[reason] for reason in REASONS if counts[reason]},
        "examples": {reason: found for reason, found in examples.items() if found},
    }
    write_file(outputs.report, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    return report


def _is_parquet(start: bytes) -> bool:
    return start.startswith(b"PAR1")


def _text(prompt: dict[str, Any]) -> str:
    return prompt["prompt"] if "prompt" in prompt else prompt["messages"][-1]["content"]


def lines_of(report: dict[str, Any]) -> list[str]:
    """A report for people."""
    kept = f"{report['kept']} prompts kept, {report['held_out']} of them held out"
    return [kept, *_reasons(report["fell_out"])]


def _reasons(counts: Mapping[str, int]) -> list[str]:
    return [f"{counts[reason]} rows fell out: {words}" for reason, words in REASONS.items() if counts.get(reason)]


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: writing parquet needs pyarrow; pip install pyarrow") from None
    buffer = io.BytesIO()
    names = ("id", "task", "question", "answer", "source")
    table = pyarrow.table({name: pyarrow.array([row.get(name) for row in rows], pyarrow.string()) for name in names})
    parquet.write_table(table, buffer)
    write_file(path, buffer.getvalue())
