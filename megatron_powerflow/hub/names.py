"""Which texts name something on the Hugging Face hub, and which a path on this disk?

    OWNER/NAME                      where neither this path nor a folder OWNER is on this disk
    OWNER/NAME@REVISION             a branch, a tag or a commit of it
    hf://OWNER/NAME[@REVISION]      always the hub's
    hf://OWNER/NAME[@REVISION]/FILE a file of a data set; hf://datasets/OWNER/NAME/FILE, as huggingface_hub says, too

A folder OWNER on this disk makes OWNER/NAME a path: a user who mistypes models/mine does not get a stranger's model.

Left out: fetching (`fetch.py`). Nothing here asks the hub.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_powerflow.data.rows import KINDS
from megatron_powerflow.errors import UserError

Kind = Literal["model", "dataset"]
PREFIX = "hf://"
COMMIT = re.compile(r"[0-9a-f]{40}")
# The files that benchmarks are published in; a data set of several files is their questions one after the other.
BENCHMARK_FILES = {
    "HuggingFaceH4/MATH-500": ("test.jsonl",),
    "HuggingFaceH4/aime_2024": ("data/train-00000-of-00001.parquet",),
    "opencompass/AIME2025": ("aime2025-I.jsonl", "aime2025-II.jsonl"),
    "math-ai/aime25": ("test.jsonl",),
    "math-ai/amc23": ("test-00000-of-00001.parquet",),
    "Hothan/OlympiadBench": ("OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",),
    "Idavidrein/gpqa": ("gpqa_diamond.csv",),
    "AI-MO/NuminaMath-CoT": ("data/test-00000-of-00001.parquet",),
}
DATA_ENDINGS = tuple(ending + packed for ending in KINDS for packed in ("", ".gz"))

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"
_FILE = r"[A-Za-z0-9_=][A-Za-z0-9_.=+-]*"
_REPOSITORY = rf"(?P<repository>{_PART}/{_PART})"
FORMS = {
    "model": re.compile(rf"{_REPOSITORY}(?:@(?P<revision>{_REVISION}(?:/{_REVISION})*))?"),
    "dataset": re.compile(
        rf"(?:datasets/)?{_REPOSITORY}(?:@(?P<revision>{_REVISION}))?(?:/(?P<file>{_FILE}(?:/{_FILE})*))?"
    ),
}
MAX_NAME_CHARACTERS = 96  # of a repository's OWNER/NAME
NAME_FORMS = {
    "model": f"a model on the hub is {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION",
    "dataset": f"data on the hub is {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME/path/in/it.jsonl; behind NAME, @REVISION",
}


@dataclass(frozen=True, slots=True)
class HubName:
    """Names a repository on the hub, or one file of a data set in it.

    repository: OWNER/NAME. revision: None where the user leaves it open. file: the path inside a data set, or None.
    """

    kind: Kind
    repository: str
    revision: str | None = None
    file: str | None = None

    @property
    def id(self) -> str:
        """Returns the key under which its commit is recorded: a model and a data set may have the same OWNER/NAME."""
        return self.repository if self.kind == "model" else f"datasets/{self.repository}"


def parse_hub_name(text: str, kind: Kind) -> HubName | None:
    """Returns what the text names on the hub; None where it is a path on this disk.

    Raises UserError for hf:// with something behind it that is no name.
    """
    marked = text.startswith(PREFIX)
    match = FORMS[kind].fullmatch(text.removeprefix(PREFIX))
    if match is None or not is_repository(match["repository"]):
        if marked:
            raise UserError(f"{text}: not a name of the hub; {NAME_FORMS[kind]}")
        return None
    if not marked and _is_path(text, match):
        return None
    return HubName(kind, **match.groupdict())


def is_repository(name: str) -> bool:
    """Whether the hub accepts the text as the name of a repository."""
    form = re.fullmatch(_REPOSITORY, name) is not None
    return form and len(name) <= MAX_NAME_CHARACTERS and not re.search(r"--|\.\.|\.git$", name)


def _is_path(text: str, match: re.Match[str]) -> bool:
    if not text.startswith(match["repository"]) or match.groupdict().get("file") or Path(text).exists():
        return True
    if match["repository"] in BENCHMARK_FILES:
        return False
    return Path(text).parent.is_dir() or text.lower().endswith(DATA_ENDINGS)
