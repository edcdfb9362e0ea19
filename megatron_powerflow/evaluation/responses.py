"""What has been answered so far? OUT/responses.jsonl, appended round by round, under the settings in OUT/settings.json.

A round is whole in the file or dropped: an evaluation that was killed continues behind the last whole round, with the
same batches, so its file equals that of an evaluation that was never killed.

Left out: noticing that the weights behind a path were changed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.whole_files import own_file, write_file

RESPONSES_NAME = "responses.jsonl"
SETTINGS_NAME = "settings.json"
EVALUATION_NAME = "evaluation.json"
JUDGEMENTS_NAME = "judgements.jsonl"
LOCK_NAME = "evaluation.lock"  # says which process owns the folder at the moment
WRITTEN = (RESPONSES_NAME, EVALUATION_NAME, JUDGEMENTS_NAME)
Line = dict[str, Any]
Key = tuple[str, str]  # task, id


def check_settings(out: Path, settings: Line) -> None:
    """Raises UserError where OUT holds answers under other settings, or files that no evaluation wrote. Reads only."""
    path = out / SETTINGS_NAME
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            before = None
        if not isinstance(before, dict):
            raise UserError(f"{path}: cannot be read; choose another --out, or remove the folder")
        names = [*settings, *(name for name in before if name not in settings)]
        changed = [name for name in names if before.get(name) != settings.get(name)]
        if changed and not nothing_answered(out):
            raise UserError(
                [f"{out}: {name} was {before.get(name)!r} there and is {settings.get(name)!r} now" for name in changed]
                + [f"{out}: holds another evaluation; choose another --out, or remove the folder"]
            )
    elif out.exists() and (not out.is_dir() or any((out / name).exists() for name in WRITTEN)):
        raise UserError(f"{out}: is there and no evaluation of ours; choose another --out")


def nothing_answered(out: Path) -> bool:
    """Whether no round of an evaluation was finished in the folder."""
    responses = out / RESPONSES_NAME
    begun = responses.is_file() and responses.stat().st_size > 0
    return not (begun or (out / EVALUATION_NAME).exists() or (out / JUDGEMENTS_NAME).exists())


def remove_unanswered(out: Path) -> None:
    """Removes the files of an evaluation that was refused before its first answer. For the folder's owner only."""
    if nothing_answered(out):
        for name in (RESPONSES_NAME, SETTINGS_NAME):
            (out / name).unlink(missing_ok=True)


def open_responses(out: Path, settings: Line, keys: Sequence[Key], num_responses: int, per_round: int) -> int:
    """Makes the folder ready for appending and returns how many questions are answered already.

    Called on the main rank only. keys: of all questions, in order. A half-written last line, and lines behind the last
    whole round of `per_round` questions, are cut off. Raises UserError for lines that this evaluation did not write.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / SETTINGS_NAME, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
    path = out / RESPONSES_NAME
    own_file(path).touch()
    ends, position = [0], 0
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            if not raw.endswith(b"\n"):
                break
            if number >= len(keys) * num_responses or not _is_line_of(raw, *divmod(number, num_responses), keys):
                raise UserError(f"{path}:{number + 1}: not the response that belongs here; remove {out}")
            position += len(raw)
            if (number + 1) % num_responses == 0:
                ends.append(position)
    num_done = len(ends) - 1
    if num_done < len(keys):
        num_done -= num_done % per_round
    os.truncate(path, ends[num_done])
    return num_done


def append_responses(out: Path, lines: Sequence[Line]) -> None:
    """Appends the lines of one round; they are on the disk when the function returns."""
    with own_file(out / RESPONSES_NAME).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def read_responses(out: Path) -> list[Line]:
    """Returns every line of responses.jsonl, in order."""
    with (out / RESPONSES_NAME).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def by_question(lines: Sequence[Line]) -> dict[Key, list[Line]]:
    """Returns the lines of each question, questions and responses in the order of the file."""
    questions: dict[Key, list[Line]] = {}
    for line in lines:
        questions.setdefault((line["task"], line["id"]), []).append(line)
    return questions


def _is_line_of(raw: bytes, question: int, response: int, keys: Sequence[Key]) -> bool:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    if not isinstance(line, dict):
        return False
    return (line.get("task"), line.get("id"), line.get("response_index")) == (*keys[question], response)
