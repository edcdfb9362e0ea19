"""Where on this disk is what a user named, and which commit of the hub is it?

Names of the hub (`names.py`) become snapshot folders in huggingface_hub's cache, HF_HOME. The main process asks the hub,
once and before any process group, and fetches. The others are told the commit: where the main process's folder is on
their disk too, as with an HF_HOME that all nodes share, they read it there; elsewhere they fetch that very commit.

    of a model      the files of its top folder: safetensors, config, tokenizer, licence, README
    of a data set   the file that is named; those of a known benchmark; else its one data file, or the parts of one

Data only: no code and no pickle is fetched, and nothing that is fetched is executed. With HF_HUB_OFFLINE what the cache
holds is taken. A commit that is known beforehand needs no hub where the cache holds it.

Left out: writing to the hub (`push.py`). Imports huggingface_hub only where a name is the hub's.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_powerflow.conversion.hf_config import read_json
from megatron_powerflow.conversion.hf_files import INDEX_NAME, SINGLE_NAME
from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.failures import failures, one_line, quiet, reason_of
from megatron_powerflow.hub.names import BENCHMARK_FILES, COMMIT, DATA_ENDINGS, PREFIX, HubName, Kind, hub_name
from megatron_powerflow.parallel.agreement import main_first
from megatron_powerflow.parallel.initialize import Launch

SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
FOLDERS = ("*/*",)
ANSWER_SECONDS = 10  # that the hub may take to say which commit a name stands for
SHOWN_FILES = 8


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a user named. label: how messages call the place where it was named, such as --model."""

    kind: Kind
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Fetched:
    """One name of the hub, on this disk. revision: the commit, 40 hexadecimal digits. files: relative to `folder`, all
    there. missing: weights that were not asked for and are not there."""

    id: str
    revision: str
    folder: str
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Located:
    """What a command's names are on this disk. A text that is not among `fetched` is a path."""

    fetched: Mapping[tuple[Kind, str], Fetched] = field(default_factory=dict)

    def folder(self, model: str | Path) -> Path:
        found = self.fetched.get(("model", str(model)))
        return Path(found.folder) if found else Path(model)

    def files(self, data: str | Path) -> tuple[Path, ...]:
        found = self.fetched.get(("dataset", str(data)))
        return tuple(Path(found.folder, file) for file in found.files) if found else (Path(data),)

    def model(self, text: str) -> Fetched | None:
        """None: a path."""
        return self.fetched.get(("model", text))

    @property
    def revisions(self) -> dict[str, str]:
        """Name on the hub -> commit."""
        return {found.id: found.revision for found in self.fetched.values()}


def locate(
    wanted: Sequence[Wanted],
    launch: Launch,
    *,
    weights: bool = True,
    recorded: Callable[[], Mapping[str, str]] = dict,
    judge: Callable[[Located], object] | None = None,
) -> Located:
    """Fetch what of `wanted` is the hub's. Collective, where any is. Raises UserError on all processes alike.

    weights: False leaves a model's weights on the hub. recorded: commits, by id, that are taken where the user names no
    revision. judge: told what there is before weights are fetched; its UserError spares the download. Both are called
    on the main process.
    """
    names = {(item.kind, item.text): (item, name) for item in wanted if (name := hub_name(item.text, item.kind))}
    if not names:
        return Located()

    def find() -> str:
        quiet()
        commits = recorded()
        found = {key: _fetch(item, name, commits.get(name.id)) for key, (item, name) in names.items()}
        if weights and any(one.missing for one in found.values()):
            if judge is not None:
                judge(Located(found))
            found = {key: _with_weights(names[key][0], one) for key, one in found.items()}
        return json.dumps([[*key, asdict(one)] for key, one in found.items()])

    def take_up(text: str) -> Located:
        told = {(kind, said): _of_json(values) for kind, said, values in json.loads(text)}
        return Located({key: _on_this_disk(names[key][0], one) for key, one in told.items()})

    return main_first(launch, "hub", find, take_up)


def _of_json(values: dict[str, Any]) -> Fetched:
    return Fetched(**values | {"files": tuple(values["files"]), "missing": tuple(values["missing"])})


def _on_this_disk(item: Wanted, found: Fetched) -> Fetched:
    """On a node that does not share the main process's cache, the same files of the same commit."""
    if all(Path(found.folder, file).is_file() for file in found.files):
        return found
    quiet(bars=False)
    name = hub_name(item.text, item.kind)
    return replace(found, folder=str(_download(item, name, found.revision, found.files)))


def _fetch(item: Wanted, name: HubName, recorded: str | None) -> Fetched:
    revision = name.revision or recorded
    if name.kind == "model":
        folder = _snapshot(item, name, revision, SMALL_FILES, lambda _: True)
        small = [path.name for pattern in SMALL_FILES for path in folder.glob(pattern)]
        shards = _shards(folder)
        there = [file for file in shards if (folder / file).is_file()]
        missing = [file for file in shards if file not in there]
        return Fetched(name.id, folder.name, str(folder), tuple(sorted({*small, *there})), tuple(missing))
    files = (name.file,) if name.file else BENCHMARK_FILES.get(name.repository) or _data_files(item, name, revision)
    folder = _snapshot(item, name, revision, files, lambda folder: all((folder / file).is_file() for file in files))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{_named(item)}: the data set {name.repository} has no file {absent[0]}; mend the name")
    return Fetched(name.id, folder.name, str(folder), tuple(files))


def _with_weights(item: Wanted, found: Fetched) -> Fetched:
    if not found.missing:
        return found
    name = hub_name(item.text, item.kind)
    folder = _download(item, name, found.revision, found.missing)
    there = [file for file in found.missing if (folder / file).is_file()]  # what is not is said where it is opened
    return replace(found, files=(*found.files, *there), missing=())


def _shards(folder: Path) -> list[str]:
    """The safetensors files that hold a model: those its index names, and no others that lie beside them."""
    if not (folder / INDEX_NAME).is_file():
        return [SINGLE_NAME]
    names = read_json(folder / INDEX_NAME, "the safetensors index").get("weight_map")
    names = names.values() if isinstance(names, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)})


def _snapshot(
    item: Wanted, name: HubName, revision: str | None, patterns: Sequence[str], whole: Callable[[Path], bool]
) -> Path:
    """The snapshot folder with the files that match. revision: None is the default branch's newest commit.

    whole: whether a folder of the cache has everything, where the hub is not asked.
    """
    cached = _cached(name, revision)
    known = cached is not None and whole(cached)
    if _offline():
        if known:
            return cached
        raise UserError(
            f"{_named(item)}: HF_HUB_OFFLINE is set, and the cache {_cache()} does not hold it; "
            f"{_instead(item)}, or fetch it where there is a network: {_download_command(name, revision)}"
        )
    try:
        _info(name, revision)
    except failures() as error:
        if known and COMMIT.fullmatch(revision or ""):  # a commit does not change
            return cached
        hint = "; HF_HUB_OFFLINE=1 takes the commit that the cache holds" if known else ""
        raise UserError(f"{_named(item)}: {reason_of(error, name, revision)}; {_instead(item)}{hint}") from None
    return _download(item, name, revision, patterns, plain=False)


def _download(
    item: Wanted, name: HubName, revision: str | None, files: Sequence[str], *, plain: bool = True
) -> Path:
    """plain: `files` are names and not patterns."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name.repository,
            repo_type=name.kind,
            revision=revision,
            allow_patterns=[glob.escape(file) for file in files] if plain else list(files),
            ignore_patterns=FOLDERS if name.kind == "model" else None,
        )
    except failures() as error:
        raise UserError(
            f"{_named(item)}: not everything of it could be fetched ({one_line(error)}); the same command goes on with "
            "what is missing"
        ) from None
    return Path(folder)


def _info(name: HubName, revision: str | None) -> Any:
    """What the hub says of the repository. Raises one of `failures()`, after ANSWER_SECONDS at the latest."""
    from huggingface_hub import HfApi

    return HfApi().repo_info(name.repository, repo_type=name.kind, revision=revision, timeout=ANSWER_SECONDS)


def _data_files(item: Wanted, name: HubName, revision: str | None) -> tuple[str, ...]:
    """The one data file of a data set, or the numbered parts of one. Raises UserError where there are several."""
    cached = _cached(name, revision)
    if _offline() and cached is not None:
        there = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
    elif _offline():
        there = []
    else:
        try:
            there = [sibling.rfilename for sibling in _info(name, revision).siblings or ()]
        except failures() as error:
            raise UserError(f"{_named(item)}: {reason_of(error, name, revision)}; {_instead(item)}") from None
    data = sorted(file for file in there if file.lower().endswith(DATA_ENDINGS))
    if len(data) == 1 or (data and len({re.sub(r"-\d{5}(?=-of-\d{5})", "", file) for file in data}) == 1):
        return tuple(data)
    if _offline() and not data:
        raise UserError(f"{_named(item)}: HF_HUB_OFFLINE is set, and the cache {_cache()} does not hold it; {_instead(item)}")
    some = ", ".join(data[:SHOWN_FILES]) + (", ..." if len(data) > SHOWN_FILES else "")
    raise UserError(
        f"{_named(item)}: the data set {name.repository} has {len(data)} data files ({some or 'of ' + ', '.join(DATA_ENDINGS)}); "
        f"name one, as {PREFIX}{name.repository}/{data[0] if data else 'FILE'}"
    )


def _cached(name: HubName, revision: str | None) -> Path | None:
    """The snapshot folder in the cache, whether or not everything is in it."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name.repository, repo_type=name.kind, revision=revision, local_files_only=True))
    except failures() as error:
        incomplete = getattr(error, "snapshot_path", None)
        return Path(incomplete) if incomplete else None


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _named(item: Wanted) -> str:
    return f"{item.label}={item.text!r}" if "." in item.label else f"{item.label} {item.text}"


def _instead(item: Wanted) -> str:
    return "give a local Hugging Face folder" if item.kind == "model" else "give a local file"


def _download_command(name: HubName, revision: str | None) -> str:
    """What fetches it elsewhere, into the cache that HF_HOME names."""
    words = ["hf download", name.repository, *((name.file,) if name.file else ())]
    words += ["--repo-type dataset"] if name.kind == "dataset" else []
    words += [f"--revision {revision}"] if revision else []
    return " ".join(words)
