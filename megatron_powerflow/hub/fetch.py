"""Where on this disk are the files of a name on the hub, and which commit of the hub are they?

Names on the hub (`names.py`) become snapshot folders in huggingface_hub's cache, HF_HOME. The main process asks the
hub, once and before any process group, and downloads. The other processes are told the commit. Where the main
process's folder is on their disk too, as with an HF_HOME that all nodes share, they read it from there; on a node
without it they download that very commit.

    of a model      the files of its top folder: safetensors, config, tokenizer, licence, README
    of a data set   the file that is named; those of a known benchmark; else its one data file, or the parts of one

Only data is downloaded: no code and no pickle, and nothing that was downloaded is executed. With HF_HUB_OFFLINE the
cache alone is read. A commit that is known beforehand needs no hub where the cache holds it.

Left out: writing to the hub (`push.py`). The module imports huggingface_hub only where a name is the hub's.
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
from megatron_powerflow.hub.failures import hub_errors, is_hub_reply, one_line, reason_of, silence_hub
from megatron_powerflow.hub.located import NO_DOWNLOADS, Download, LocalPaths, RequestedName
from megatron_powerflow.hub.names import BENCHMARK_FILES, COMMIT, DATA_ENDINGS, PREFIX, HubName, parse_hub_name
from megatron_powerflow.parallel.agreement import main_first
from megatron_powerflow.parallel.launch import Launch

CONFIG_NAME = "config.json"
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "README.md")
FOLDERS = ("*/*",)
ANSWER_SECONDS = 10  # that the hub may take to say which commit a name stands for
SHOWN_FILES = 8
PART_NUMBER = re.compile(r"-\d{5}(?=-of-\d{5})")


def locate(
    requested: Sequence[RequestedName],
    launch: Launch,
    *,
    weights: bool = True,
    recorded: Callable[[], Mapping[str, str]] = dict,
    check: Callable[[LocalPaths], object] | None = None,
) -> LocalPaths:
    """Downloads the names of `requested` that are the hub's, and returns where the files of all names are.

    Collective where any name is the hub's. Raises UserError on all processes alike. weights: False leaves a model's
    weights on the hub. recorded: returns the commits, by id, that are taken where the user names no revision. check:
    is called with the small files before weights are downloaded, so that its UserError spares the download. Both are
    called on the main process only.
    """
    names = {
        (item.kind, item.text): (item, name) for item in requested if (name := parse_hub_name(item.text, item.kind))
    }
    if not names:
        return NO_DOWNLOADS

    def find() -> str:
        silence_hub()
        commits, downloads = dict(recorded()), {}
        for key, (item, name) in names.items():
            downloads[key] = _fetch(item, name, commits.get(name.id))
            if name.revision is None:
                commits[name.id] = downloads[key].revision  # for the other files of the same repository too
        if weights and any(download.missing for download in downloads.values()):
            if check is not None:
                check(LocalPaths(downloads))
            downloads = {key: _with_weights(names[key][0], download) for key, download in downloads.items()}
        return json.dumps([[*key, asdict(download)] for key, download in downloads.items()])

    def take_up(text: str) -> LocalPaths:
        downloads = {(kind, name): _of_json(values) for kind, name, values in json.loads(text)}
        return LocalPaths({key: _on_this_disk(names[key][0], download) for key, download in downloads.items()})

    return main_first(launch, "hub", find, take_up)


def _of_json(values: dict[str, Any]) -> Download:
    return Download(**values | {"files": tuple(values["files"]), "missing": tuple(values["missing"])})


def _on_this_disk(item: RequestedName, download: Download) -> Download:
    """Returns the main process's download, downloaded again on a node that does not share that process's cache."""
    if all(Path(download.folder, file).is_file() for file in download.files):
        return download
    silence_hub(bars=False)
    folder = _download(item, _commit_of(item, download), [glob.escape(file) for file in download.files])
    return replace(download, folder=str(folder))


def _fetch(item: RequestedName, name: HubName, recorded: str | None) -> Download:
    """Downloads all of a name but a model's weights; these are listed as files where the cache holds them."""
    name = replace(name, revision=name.revision or recorded)
    if name.kind == "dataset":
        files = (name.file,) if name.file else BENCHMARK_FILES.get(name.repository) or _data_files(item, name)
        folder = _snapshot(item, name, [glob.escape(file) for file in files], files)
        if absent := [file for file in files if not (folder / file).is_file()]:
            raise UserError(f"{item}: the data set {name.repository} has no file {absent[0]}; mend the name")
        return Download(name.id, folder.name, str(folder), tuple(files))
    folder = _snapshot(item, name, SMALL_FILES, (CONFIG_NAME,))
    small = {path.name for pattern in SMALL_FILES for path in folder.glob(pattern)}
    shards = _shards(folder)
    cached = {file for file in shards if (folder / file).is_file()}
    missing = tuple(file for file in shards if file not in cached)
    return Download(name.id, folder.name, str(folder), tuple(sorted(small | cached)), missing)


def _with_weights(item: RequestedName, download: Download) -> Download:
    if not download.missing:
        return download
    name = _commit_of(item, download)
    if _offline():
        raise UserError(_not_cached(item, name))
    folder = _download(item, name, [glob.escape(file) for file in download.missing])
    # a shard that did not come is reported by the reader of the folder
    arrived = [file for file in download.missing if (folder / file).is_file()]
    return replace(download, files=(*download.files, *arrived), missing=())


def _commit_of(item: RequestedName, download: Download) -> HubName:
    return HubName(item.kind, download.id.removeprefix("datasets/"), download.revision)


def _shards(folder: Path) -> list[str]:
    """Returns the safetensors files that hold a model: those its index names, and no others that lie beside them."""
    if not (folder / INDEX_NAME).is_file():
        return [SINGLE_NAME]
    names = read_json(folder / INDEX_NAME, "the safetensors index").get("weight_map")
    names = names.values() if isinstance(names, dict) else ()
    return sorted({name for name in names if isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)})


def _snapshot(item: RequestedName, name: HubName, patterns: Sequence[str], needed: Sequence[str]) -> Path:
    """Returns the snapshot folder with the files that match `patterns`.

    needed: the files that make a cached folder good enough where the hub cannot be asked.
    """
    cached = _cached(name, needed)
    if _offline():
        if cached is None:
            raise UserError(_not_cached(item, name))
        return cached
    try:
        _ask(name)
    except hub_errors() as error:
        if cached is not None and COMMIT.fullmatch(name.revision or ""):  # a commit does not change
            return cached
        hint = "" if cached is None else "; HF_HUB_OFFLINE=1 takes the commit that the cache holds"
        raise UserError(_refusal(item, name, error) + hint) from None
    return _download(item, name, patterns)


def _download(item: RequestedName, name: HubName, patterns: Sequence[str]) -> Path:
    """Downloads the files that match from the revision's newest commit, and returns the snapshot folder."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name.repository,
            repo_type=name.kind,
            revision=name.revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(FOLDERS) if name.kind == "model" else None,
        )
    except hub_errors() as error:
        raise UserError(
            f"{item}: not everything of it could be fetched ({one_line(error)}); the same command goes on with what is "
            f"missing, or {item.instead}"
        ) from None
    if not COMMIT.fullmatch(Path(folder).name):
        raise UserError(f"{item}: the hub names no commit of it but {Path(folder).name!r}; {item.instead}")
    return Path(folder)


def _ask(name: HubName) -> Any:
    """Returns what the hub says of the repository. Raises one of `hub_errors()`, after ANSWER_SECONDS at the latest.

    The request that huggingface_hub itself makes before a download has no such limit.
    """
    from huggingface_hub import HfApi

    return HfApi().repo_info(name.repository, repo_type=name.kind, revision=name.revision, timeout=ANSWER_SECONDS)


def _data_files(item: RequestedName, name: HubName) -> tuple[str, ...]:
    """Returns the one data file of a data set, or its numbered parts. Raises UserError where there are others."""
    if _offline():
        raise UserError(f"{item}: HF_HUB_OFFLINE is set; name the file, as {PREFIX}{name.repository}/FILE")
    try:
        siblings = _ask(name).siblings or ()
    except hub_errors() as error:
        raise UserError(_refusal(item, name, error)) from None
    data = sorted(sibling.rfilename for sibling in siblings if sibling.rfilename.lower().endswith(DATA_ENDINGS))
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
    """Returns the snapshot folder in the cache that holds all of these files; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    folder = None
    for file in needed:
        path = try_to_load_from_cache(name.repository, file, revision=name.revision, repo_type=name.kind)
        if not isinstance(path, str):
            return None
        folder = Path(path).parents[file.count("/")]
    return folder


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _refusal(item: RequestedName, name: HubName, error: Exception) -> str:
    not_local = "" if item.text.startswith(PREFIX) else "it is not on this disk, and "
    elsewhere = "" if is_hub_reply(error) else f", or {_fill_the_cache(name)}"
    return f"{item}: {not_local}{reason_of(error, name)}; {item.instead}{elsewhere}"


def _not_cached(item: RequestedName, name: HubName) -> str:
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
