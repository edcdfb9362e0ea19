"""Which files make up a data set of the Hugging Face hub, and where are they on this disk?

The benchmarks by name (HuggingFaceH4/MATH-500), anything else by file (hf://OWNER/NAME/path/in/it.jsonl). Files go to
huggingface_hub's own cache and are read as data: no loading script is ever run.

Left out: everything after the download (`rows.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

from megatron_powerflow.errors import UserError

PREFIX = "hf://"
# The files that benchmarks are published in; a data set of several files is their questions one after the other.
HUB_FILES = {
    "HuggingFaceH4/MATH-500": ("test.jsonl",),
    "HuggingFaceH4/aime_2024": ("data/train-00000-of-00001.parquet",),
    "opencompass/AIME2025": ("aime2025-I.jsonl", "aime2025-II.jsonl"),
    "math-ai/aime25": ("test.jsonl",),
    "math-ai/amc23": ("test-00000-of-00001.parquet",),
    "Hothan/OlympiadBench": ("OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",),
    "Idavidrein/gpqa": ("gpqa_diamond.csv",),
    "AI-MO/NuminaMath-CoT": ("data/test-00000-of-00001.parquet",),
}


def is_hub_name(name: str) -> bool:
    return name in HUB_FILES or name.startswith(PREFIX)


def fetch(name: str, *, endpoint: str | None = None, cache: Path | None = None) -> list[Path]:
    """Local copies of a data set's files. Raises UserError when they cannot be had.

    endpoint, cache: another hub than huggingface.co, another folder than huggingface_hub's.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    repository, files = _parse(name)
    try:
        return [
            Path(hf_hub_download(repository, file, repo_type="dataset", endpoint=endpoint, cache_dir=cache))
            for file in files
        ]
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise UserError(
            f"{name}: cannot be fetched from the hub ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            f"download {', '.join(files)} of huggingface.co/datasets/{repository} elsewhere and give the file"
        ) from None


def _parse(name: str) -> tuple[str, tuple[str, ...]]:
    if name in HUB_FILES:
        return name, HUB_FILES[name]
    parts = re.fullmatch(rf"{PREFIX}([\w.-]+/[\w.-]+)/([\w./-]+)", name)
    if not parts:
        raise UserError(f"{name}: a file on the hub is {PREFIX}OWNER/NAME/path/in/the/data/set.jsonl")
    return parts[1], (parts[2],)
