"""Where on this disk is what a user named, and which commit of the hub is it?

Names on the hub (`names.py`) become snapshot folders in huggingface_hub's cache, HF_HOME. The main process asks the
hub, once and before any process group, and fetches. The others are told the commit. Where the main process's folder is
on their disk too, as with an HF_HOME that all nodes share, they read it there; elsewhere they fetch that very commit.

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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_json
from megatron_powerflow.hf.files import INDEX_NAME, SINGLE_NAME
from megatron_powerflow.hub.failures import answered, failures, one_line, quiet, reason_of
from megatron_powerflow.hub.located import AS_NAMED, Fetched, Located, Wanted
from megatron_powerflow.hub.names import BENCHMARK_FILES, COMMIT, DATA_ENDINGS, PREFIX, HubName, hub_name
from megatron_powerflow.parallel.agreement import main_first
from megatron_powerflow.parallel.initialize import Launch

CONFIG_NAME = "config.json"
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
FOLDERS = ("*/*",)
ANSWER_SECONDS = 10  # that the hub may take to say which commit a name stands for
SHOWN_FILES = 8
PART_NUMBER = re.compile(r"-\d{5}(?=-of-\d{5})")


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
        return AS_NAMED

    def find() -> str:
        quiet()
        commits, found = dict(recorded()), {}
        for key, (item, name) in names.items():
            found[key] = _fetch(item, name, commits.get(name.id))
            if name.revision is None:
                commits[name.id] = found[key].revision  # of its other files too
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
    folder = _download(item, _commit_of(item, found), [glob.escape(file) for file in found.files])
    return replace(found, folder=str(folder))


def _fetch(item: Wanted, name: HubName, recorded: str | None) -> Fetched:
    """All but a model's weights; these too where the cache holds them."""
    name = replace(name, revision=name.revision or recorded)
    if name.kind == "dataset":
        files = (name.file,) if name.file else BENCHMARK_FILES.get(name.repository) or _data_files(item, name)
        folder = _snapshot(item, name, [glob.escape(file) for file in files], files)
        if absent := [file for file in files if not (folder / file).is_file()]:
            raise UserError(f"{item}: the data set {name.repository} has no file {absent[0]}; mend the name")
        return Fetched(name.id, folder.name, str(folder), tuple(files))
    folder = _snapshot(item, name, SMALL_FILES, (CONFIG_NAME,))
    small = {path.name for pattern in SMALL_FILES for path in folder.glob(pattern)}
    shards = _shards(folder)
    there = {file for file in shards if (folder / file).is_file()}
    missing = tuple(file for file in shards if file not in there)
    return Fetched(name.id, folder.name, str(folder), tuple(sorted(small | there)), missing)


def _with_weights(item: Wanted, found: Fetched) -> Fetched:
    if not found.missing:
        return found
    name = _commit_of(item, found)
    if _offline():
        raise UserError(_not_cached(item, name))
    folder = _download(item, name, [glob.escape(file) for file in found.missing])
    there = [file for file in found.missing if (folder / file).is_file()]  # whoever opens them says what is not
    return replace(found, files=(*found.files, *there), missing=())


def _commit_of(item: Wanted, found: Fetched) -> HubName:
    return HubName(item.kind, found.id.removeprefix("datasets/"), found.revision)


def _shards(folder: Path) -> list[str]:
    """The safetensors files that hold a model: those its index names, and no others that lie beside them."""
    if not (folder / INDEX_NAME).is_file():
        return [SINGLE_NAME]
    names = read_json(folder / INDEX_NAME, "the safetensors index").get("weight_map")
    names = names.values() if isinstance(names, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)})


def _snapshot(item: Wanted, name: HubName, patterns: Sequence[str], needed: Sequence[str]) -> Path:
    """The snapshot folder with the files that match `patterns`. needed: what a cache must hold to do without a hub."""
    cached = _cached(name, needed)
    if _offline():
        if cached is None:
            raise UserError(_not_cached(item, name))
        return cached
    try:
        _ask(name)
    except failures() as error:
        if cached is not None and COMMIT.fullmatch(name.revision or ""):  # a commit does not change
            return cached
        hint = "" if cached is None else "; HF_HUB_OFFLINE=1 takes the commit that the cache holds"
        raise UserError(_refusal(item, name, error) + hint) from None
    return _download(item, name, patterns)


def _download(item: Wanted, name: HubName, patterns: Sequence[str]) -> Path:
    """The snapshot folder, with what matches of the revision's newest commit."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name.repository,
            repo_type=name.kind,
            revision=name.revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(FOLDERS) if name.kind == "model" else None,
        )
    except failures() as error:
        raise UserError(
            f"{item}: not everything of it could be fetched ({one_line(error)}); the same command goes on with what is "
            f"missing, or {item.instead}"
        ) from None
    if not COMMIT.fullmatch(Path(folder).name):
        raise UserError(f"{item}: the hub names no commit of it but {Path(folder).name!r}; {item.instead}")
    return Path(folder)


def _ask(name: HubName) -> Any:
    """What the hub says of the repository. Raises one of `failures()`, after ANSWER_SECONDS at the latest: the question
    that huggingface_hub itself asks before a download waits without end."""
    from huggingface_hub import HfApi

    return HfApi().repo_info(name.repository, repo_type=name.kind, revision=name.revision, timeout=ANSWER_SECONDS)


def _data_files(item: Wanted, name: HubName) -> tuple[str, ...]:
    """The one data file of a data set, or the numbered parts of one. Raises UserError where there are others."""
    if _offline():
        raise UserError(f"{item}: HF_HUB_OFFLINE is set; name the file, as {PREFIX}{name.repository}/FILE")
    try:
        siblings = _ask(name).siblings or ()
    except failures() as error:
        raise UserError(_refusal(item, name, error)) from None
    data = sorted(one.rfilename for one in siblings if one.rfilename.lower().endswith(DATA_ENDINGS))
    if not data:
        raise UserError(f"{item}: the data set {name.repository} has no file of {', '.join(DATA_ENDINGS)}")
    if len({PART_NUMBER.sub("", file) for file in data}) == 1:
        return tuple(data)
    some = ", ".join(data[:SHOWN_FILES]) + (", ..." if len(data) > SHOWN_FILES else "")
    raise UserError(
        f"{item}: the data set {name.repository} has {len(data)} data files ({some}); name one, as "
        f"{PREFIX}{name.repository}/{data[0]}"
    )


def _cached(name: HubName, needed: Sequence[str]) -> Path | None:
    """The snapshot folder in the cache that holds these files."""
    from huggingface_hub import try_to_load_from_cache

    folder = None
    for file in needed:
        found = try_to_load_from_cache(name.repository, file, revision=name.revision, repo_type=name.kind)
        if not isinstance(found, str):
            return None
        folder = Path(found).parents[file.count("/")]
    return folder


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _refusal(item: Wanted, name: HubName, error: Exception) -> str:
    here = "" if item.text.startswith(PREFIX) else "it is not on this disk, and "
    elsewhere = "" if answered(error) else f", or {_fill_the_cache(name)}"
    return f"{item}: {here}{reason_of(error, name)}; {item.instead}{elsewhere}"


def _not_cached(item: Wanted, name: HubName) -> str:
    from huggingface_hub import constants

    return (
        f"{item}: HF_HUB_OFFLINE is set, and the cache {constants.HF_HUB_CACHE} does not hold all of it; "
        f"{item.instead}, or {_fill_the_cache(name)}"
    )


def _fill_the_cache(name: HubName) -> str:
    words = ["hf", "download", name.repository, *((name.file,) if name.file else ())]
    words += ["--repo-type", "dataset"] if name.kind == "dataset" else []
    words += ["--revision", name.revision] if name.revision else []
    return f"fill the cache where there is a network: {' '.join(words)}"
