"""Which samples and evaluations does a run keep? JSON lines, each of a step: samples.jsonl, evaluations.jsonl.

A resumed run replaces the lines of the steps that were lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import write_file

SAMPLES_NAME = "samples.jsonl"
EVALUATIONS_NAME = "evaluations.jsonl"


def read_step_log(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a file, each with a `step`; none where there is no file. Raises UserError for a damaged one.

    A line of samples.jsonl has id, question, prompt, response, answer, finish_reason and num_response_tokens. A line of
    evaluations.jsonl is explained in `training/in_training_evaluation.py`.
    """
    if not path.is_file():
        return []
    try:
        # not splitlines(): it also splits at U+2028, U+0085 and the like, which an answer may hold
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if not all(isinstance(line, dict) and isinstance(line["step"], int) for line in lines):
            raise ValueError("a line without a step")
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); move it away, and the run goes on with a new one") from None
    return lines


def write_step_log(path: Path, step: int, lines: Sequence[dict[str, Any]]) -> None:
    """Adds the lines made before step number `step`.

    Lines of this step and later ones are from a try that was lost, and are replaced.
    """
    kept = [line for line in read_step_log(path) if line["step"] < step]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [*kept, *lines])
    write_file(path, text)
