"""Does a run that goes on read what it began with? Content counts, and not how a path is spelt.

    RUN/inputs.json, and one in each checkpoint:
    {"format": 1, "today": "2026-11-26", "paths": {...}, "digests": {...}, "replay": {file: digest}, "versions": {...},
     "revisions": {name on the hub: commit}}

    weights       of each tensor its name, dtype, shape and bytes, in whatever files they lie: all bytes of a model of
                  up to WHOLE_BYTES, of a larger one NUM_BLOCKS blocks of each tensor, which any training changes
    tokenizer     what turns text into ids, as it stands in the folder; the layout of a JSON file says nothing
    prompts       ids, token ids, answers and tasks of all prompts: a file that was reformatted is the same one, and one
                  that a newer tokenizers library reads otherwise is not
    evaluation    the same of the evaluation prompts
    replay        of each file of saved rollouts

`today` is the date of the run's first start, which chat templates are told at every later one; `revisions` are what a
run that goes on takes of the hub.

Left out: settings (`plan.py` compares the configs). Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import IO

from megatron_powerflow.checkpoint.folder import INPUTS_NAME
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.files import companion_files, weights_files
from megatron_powerflow.hub.names import COMMIT
from megatron_powerflow.records import Prompt
from megatron_powerflow.whole_files import ordinary, write_file

FORMAT = 1
WHOLE_BYTES = 2**30
PIECE = 2**24  # bytes read at a time
MAX_HEADER_BYTES = 10**8  # safetensors' own limit
BLOCK, NUM_BLOCKS = 4096, 16  # of what is sampled: from its start, its end and evenly between
KEY_OF = {"weights": "model.hf_path", "tokenizer": "model.hf_path", "prompts": "prompts.path"}
KEY_OF |= {"evaluation": "evaluation.prompts"}
LIBRARIES = ("tokenizers", "transformers")


@dataclass(frozen=True)
class Inputs:
    """What a run reads, as digests that a later start compares with.

    today: the date of the run's first start, as YYYY-MM-DD. digests: by what is read. paths: where it was, for
    messages. replay: by the name of the file. versions: of LIBRARIES. revisions: 40 hexadecimal digits, by the name on
    the hub; data sets' begin with datasets/.
    """

    today: str
    digests: Mapping[str, str]
    paths: Mapping[str, str]
    replay: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: {name: version(name) for name in LIBRARIES})
    revisions: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the inputs into a folder, as inputs.json."""
        write_file(folder / INPUTS_NAME, json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")


def read_inputs(folder: Path) -> Inputs | None:
    """Read what a run or checkpoint began with; None for one of an older version.

    Raises UserError for a damaged file.
    """
    path = folder / INPUTS_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = values.pop("format") == FORMAT
        inputs = Inputs(**values)
        date.fromisoformat(inputs.today)
        maps = (inputs.digests, inputs.paths, inputs.replay, inputs.versions, inputs.revisions)
        if not known or not all(isinstance(item, str) for texts in maps for pair in texts.items() for item in pair):
            raise ValueError
        if not all(COMMIT.fullmatch(revision) for revision in inputs.revisions.values()):
            raise ValueError
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: says not what the run began with; continue from another checkpoint") from None
    return inputs


def model_digests(hf_folder: Path, weights_folder: Path) -> dict[str, str]:
    """Return the digest of the tokenizer and, where there are any, that of the weights.

    The keys are "tokenizer" and "weights".
    """
    files = weights_files(weights_folder)
    tokenizer = [path for path in companion_files(hf_folder) if path.name not in ("generation_config.json", "LICENSE")]
    digests = {"tokenizer": digest(f"{path}\0{_of_text(hf_folder / path)}" for path in tokenizer)}
    return digests | ({"weights": weights_digest(files)} if files else {})


def prompt_digest(prompts: Sequence[Prompt]) -> str:
    """Return the digest of the ids, token ids, answers and tasks of prompts, in their order."""
    return digest(json.dumps([p.id, p.token_ids, p.answer, p.task]) for p in prompts)


def file_digest(path: Path) -> str:
    """Return the digest of a file: of all bytes up to a size of WHOLE_BYTES, of blocks of a larger one."""
    size = path.stat().st_size
    with ordinary(path).open("rb") as file:
        return _blocks(file, 0, size, size <= WHOLE_BYTES)


def weights_digest(files: Sequence[Path]) -> str:
    """Return the digest of the tensors that the files hold together, in whatever files they lie.

    All bytes count if the files have up to WHOLE_BYTES together, else blocks of each tensor. Files that are no
    safetensors, or are damaged, count as they are.
    """
    whole = sum(path.stat().st_size for path in files) <= WHOLE_BYTES
    return digest(sorted(part for path in files for part in _parts(path, whole)))


def _parts(path: Path, whole: bool) -> Iterator[str]:
    tensors = _tensors(path) if path.suffix == ".safetensors" else None
    with ordinary(path).open("rb") as file:
        if tensors is None:
            yield f"{path.name}\0{_blocks(file, 0, path.stat().st_size, whole)}"
            return
        for name, dtype, shape, start, end in tensors:
            yield f"{name}\0{dtype}\0{shape}\0{_blocks(file, start, end, whole)}"


def _tensors(path: Path) -> list[tuple[str, str, list[int], int, int]] | None:
    """Return (name, dtype, shape, first byte, byte behind the last) of each tensor in a file.

    None where the header cannot be read.
    """
    try:
        with ordinary(path).open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, path.stat().st_size):
                return None
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = [
            (name, str(one["dtype"]), list(one["shape"]), *(8 + length + int(at) for at in one["data_offsets"]))
            for name, one in header.items()
        ]
        return found if all(0 <= start <= end for *_, start, end in found) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _blocks(file: IO[bytes], start: int, end: int, whole: bool) -> str:
    found, size = hashlib.sha256(str(end - start).encode()), end - start
    places: Sequence[int]
    if whole or size <= BLOCK * NUM_BLOCKS:
        places, length = range(start, end, PIECE), PIECE
    else:
        places = [start + (size - BLOCK) * number // (NUM_BLOCKS - 1) for number in range(NUM_BLOCKS)]
        length = BLOCK
    for place in places:
        file.seek(place)
        found.update(file.read(min(length, end - place)))
    return found.hexdigest()


def digest(parts: Iterable[str]) -> str:
    """Return the SHA-256 of the parts, each with a line feed behind it, as hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode("utf-8", errors="surrogatepass") + b"\n")
    return found.hexdigest()


def _of_text(path: Path) -> str:
    """Return the digest of a small file: of what a JSON file says, of the bytes of any other."""
    content = ordinary(path).read_bytes()
    if path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):
            content = json.dumps(json.loads(content), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class ContentChange:
    """Something that is not as it was when the run began.

    key: of the config; before, now: digests; text: a sentence, with what to do.
    """

    key: str
    before: str
    now: str
    text: str


def changes(before: Inputs, now: Inputs) -> list[ContentChange]:
    """Return what is not as it was when the run began; [] for nothing.

    Evaluation prompts of another path are another choice, which a run may make on its way.
    """
    found = []
    for name in before.digests.keys() & now.digests.keys():
        then, today = before.digests[name], now.digests[name]
        moved = before.paths.get(name) != now.paths.get(name)
        if then == today or (name == "evaluation" and moved):
            continue
        text = f"{KEY_OF[name]}={now.paths.get(name)}: {_what(name, before, now)}"
        found.append(ContentChange(KEY_OF[name], then, today, text))
    for name in before.replay.keys() & now.replay.keys():
        then, today = before.replay[name], now.replay[name]
        if then != today:
            text = f"rollout.replay: {name} is another file than when the run began"
            found.append(ContentChange("rollout.replay", then, today, text))
    return sorted(found, key=lambda change: change.text)


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
