"""Is a run that goes on fed with what it began with? Content counts, and not how a path is spelt.

    RUN/inputs.json, and one in each checkpoint:
    {"format": 1, "today": "2026-11-26", "paths": {...}, "digests": {...}, "replay": {file: digest}, "versions": {...},
     "revisions": {name on the hub: commit}}

    weights       sizes and sampled blocks of every weights file: other weights differ in nearly every block
    tokenizer     what turns text into ids, as it stands in the folder
    prompts       ids, token ids, answers and tasks of all prompts: a file that was reformatted is the same one, and one
                  that a newer tokenizers library reads otherwise is not
    evaluation    the same of the evaluation prompts
    replay        of each file of saved rollouts

`today` is the date of the run's first start, which chat templates are told at every later one; `revisions` are what a
run that goes on takes of the hub.

Left out: settings (`plan.py` compares the configs). Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

from megatron_powerflow.checkpoint.folder import INPUTS_NAME
from megatron_powerflow.conversion.hf_files import companion_files, weights_files
from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.names import COMMIT
from megatron_powerflow.records import Prompt

FORMAT = 1
BLOCK, NUM_BLOCKS = 4096, 16  # of a file that is sampled: from its start, its end and evenly between
KEY_OF = {"weights": "model.hf_path", "tokenizer": "model.hf_path", "prompts": "prompts.path"}
KEY_OF |= {"evaluation": "evaluation.prompts"}
LIBRARIES = ("tokenizers", "transformers")


@dataclass(frozen=True)
class Inputs:
    """digests: by what is read. paths: where it was, for messages. replay: by the name of the file. revisions: 40
    hexadecimal digits, by the name on the hub; data sets' begin with datasets/."""

    today: str
    digests: Mapping[str, str]
    paths: Mapping[str, str]
    replay: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})
    revisions: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        partial = folder / (INPUTS_NAME + ".partial")
        partial.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / INPUTS_NAME)


def read_inputs(folder: Path) -> Inputs | None:
    """What a run or checkpoint began with; None for one of an older version. Raises UserError for a damaged file."""
    path = folder / INPUTS_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = values.pop("format") == FORMAT
        found = Inputs(**values)
        date.fromisoformat(found.today)
        maps = (found.digests, found.paths, found.replay, found.versions, found.revisions)
        if not known or not all(isinstance(item, str) for texts in maps for pair in texts.items() for item in pair):
            raise ValueError
        if not all(COMMIT.fullmatch(revision) for revision in found.revisions.values()):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: says not what the run began with; continue from another checkpoint") from None
    return found


def model_digests(hf_folder: Path, weights_folder: Path) -> dict[str, str]:
    """Of the weights, where there are any, and of the tokenizer."""
    files = weights_files(weights_folder)
    tokenizer = [path for path in companion_files(hf_folder) if path.name not in ("generation_config.json", "LICENSE")]
    found = {"tokenizer": digest(f"{path}\0{_of_bytes((hf_folder / path).read_bytes())}" for path in tokenizer)}
    return found | ({"weights": digest(sampled(path) for path in files)} if files else {})


def prompt_digest(prompts: Sequence[Prompt]) -> str:
    return digest(json.dumps([p.id, p.token_ids, p.answer, p.task]) for p in prompts)


def sampled(path: Path) -> str:
    """Of the size and some blocks of a file, of all of a small one."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(NUM_BLOCKS):
            file.seek((size - BLOCK) * number // (NUM_BLOCKS - 1) if size > BLOCK * NUM_BLOCKS else number * BLOCK)
            found.update(file.read(BLOCK))
    return found.hexdigest()


def digest(parts: Iterable[str]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", errors="surrogatepass") + b"\n")
    return found.hexdigest()


def _of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def changes(before: Inputs, now: Inputs) -> list[str]:
    """What is not as it was when the run began, with what to do. Evaluation prompts of another path are another choice,
    which a run may make on its way."""
    found = []
    for name in before.digests.keys() & now.digests.keys():
        if before.digests[name] == now.digests[name]:
            continue
        moved = before.paths.get(name) != now.paths.get(name)
        if name == "evaluation" and moved:
            continue
        found.append(f"{KEY_OF[name]}={now.paths.get(name)}: {_what(name, before, now)}")
    found += [
        f"rollout.replay: {name} is another file than when the run began"
        for name in sorted(before.replay.keys() & now.replay.keys())
        if before.replay[name] != now.replay[name]
    ]
    return sorted(found)


def _what(name: str, before: Inputs, now: Inputs) -> str:
    if name == "weights":
        return "these are not the weights that the run began with; put those back, or name a new run.output_dir"
    if name == "tokenizer":
        return "this is not the tokenizer that the run began with; put it back, or name a new run.output_dir"
    libraries = [
        f"{library} {before.versions[library]} then, {now.versions[library]} now"
        for library in sorted(before.versions.keys() & now.versions.keys())
        if before.versions[library] != now.versions[library]
    ]
    why = f" ({'; '.join(libraries)})" if libraries else ""
    return (
        f"these are not the prompts that the run began with{why}, and its place in them means nothing here; put them "
        "back, or name a new run.output_dir"
    )
