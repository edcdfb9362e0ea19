"""How does an exported folder become a repository on the hub, and whose repository may it replace?

    judge_push   before any work: is there a token, does the hub take it, and is the repository free, empty or ours?
    push         the folder when it is whole on the disk; its commit's address

Ours is a repository with the mark of an export (`targets.py`: conversion.json), and a push replaces the files that the
mark lists and no others. A new repository gets the mark first: what a push that failed has left there is ours, too.

Left out: fetching (`fetch.py`).
"""

from __future__ import annotations

import glob
import json
import shlex
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.files import SafetensorsFolder
from megatron_powerflow.hub.failures import failures, one_line, quiet
from megatron_powerflow.hub.names import is_repository
from megatron_powerflow.parallel.agreement import main_first
from megatron_powerflow.parallel.initialize import Launch
from megatron_powerflow.targets import MARK_NAME, Target

OPTION = "--push-to-hub"
ANSWER_SECONDS = 10
OF_A_NEW_REPOSITORY = {".gitattributes"}
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Push:
    """A push that may be made. head: the commit that it replaces; None: there is no repository yet. marked: whether the
    mark of an export is there. replaced: the files that the mark lists."""

    repository: str
    private: bool
    head: str | None = None
    marked: bool = False
    replaced: tuple[str, ...] = ()


def judge_push(repository: str, private: bool, target: Target, launch: Launch) -> Push:
    """Whether the repository may be written by what writes `target`; asks the hub, changes nothing. Collective.

    Raises UserError on all processes alike.
    """

    def find() -> str:
        return json.dumps(asdict(_judge(repository, private, target.made_by)))

    def take_up(text: str) -> Push:
        values = json.loads(text)
        return Push(**values | {"replaced": tuple(values["replaced"])})

    return main_first(launch, "push", find, take_up)


def _judge(repository: str, private: bool, made_by: str) -> Push:
    from huggingface_hub import HfApi, constants, errors, get_token

    quiet()
    name, hub = f"{OPTION} {repository}", constants.ENDPOINT
    if not is_repository(repository):
        raise UserError(f"{name}: not the name of a repository; a name is OWNER/NAME of letters, digits, -, _ and .")
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{name}: HF_HUB_OFFLINE is set; unset it, or leave {OPTION} out and push the folder later")
    if get_token() is None:
        raise UserError(f"{name}: there is no token for {hub}; {LOG_IN}")
    api = HfApi()
    try:
        info = api.model_info(repository, timeout=ANSWER_SECONDS)
    except errors.RepositoryNotFoundError:  # what a token that is not valid gets to see, too
        info = None
    except failures() as error:
        raise UserError(
            f"{name}: {hub} did not say whether it is there ({one_line(error)}); leave {OPTION} out and push the "
            "folder later, where there is a network"
        ) from None
    try:
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    except failures() as error:
        raise UserError(f"{name}: {hub} does not take the token ({one_line(error)}); {LOG_IN}") from None
    if role == "read":
        raise UserError(f"{name}: the token may read only; {LOG_IN} with one that may write")
    if info is None:
        return Push(repository, private)
    if private and not info.private:
        raise UserError(f"{name}: the repository is there and public; --private is for a new one: leave it out")
    there = {sibling.rfilename for sibling in info.siblings or ()}
    if there <= OF_A_NEW_REPOSITORY:
        return Push(repository, private, info.sha)
    mark = _mark(repository, info.sha, name) if MARK_NAME in there else {}
    if mark.get("made_by") != made_by:
        some = ", ".join(sorted(there - OF_A_NEW_REPOSITORY)[:3])
        raise UserError(f"{name}: the repository holds {some}, and no {made_by} wrote it; name one that is not there")
    listed = [file for file in mark.get("files") or () if file in there]
    return Push(repository, private, info.sha, True, tuple(listed))


def _mark(repository: str, revision: str | None, name: str) -> Mapping[str, Any]:
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = hf_hub_download(repository, MARK_NAME, revision=revision, local_dir=folder)
            values = json.loads(Path(path).read_bytes())
        except failures() as error:
            raise UserError(f"{name}: its {MARK_NAME} cannot be read ({one_line(error)}); try again later") from None
    return values if isinstance(values, dict) else {}


def push(folder: Path, asked: Push) -> str:
    """The address of the commit with the folder's files. Raises UserError with how to push later; the folder stays."""
    from huggingface_hub import HfApi

    files = _whole(folder)
    api, message = HfApi(), "powerflow export"
    head = asked.head
    try:
        if head is None:
            api.create_repo(asked.repository, private=asked.private or None)
        if not asked.marked:
            mark = folder / MARK_NAME
            head = api.upload_file(
                path_or_fileobj=mark,
                path_in_repo=MARK_NAME,
                repo_id=asked.repository,
                commit_message=f"{message}: begun",
                parent_commit=head,
            ).oid
        done = api.upload_folder(
            repo_id=asked.repository,
            folder_path=folder,
            commit_message=message,
            parent_commit=head,
            delete_patterns=[glob.escape(file) for file in asked.replaced if file not in files] or None,
        )
    except failures() as error:
        later = shlex.join(["hf", "upload", asked.repository, str(folder), "."])
        raise UserError(
            f"{OPTION} {asked.repository}: the push failed ({one_line(error)}); the export is whole in {folder}, and "
            f"`{later}` pushes it later"
        ) from None
    return done.commit_url


def _whole(folder: Path) -> list[str]:
    """The files of the export, by its mark. Raises UserError where one is not there or its weights are not whole."""
    files = json.loads((folder / MARK_NAME).read_bytes())["files"]
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{folder}: {absent[0]} is gone since it was written; nothing was pushed: export again")
    SafetensorsFolder(folder)
    return files
