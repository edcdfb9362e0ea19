"""How does an exported folder become a repository on the hub, and whose repository may it replace?

    check_push   before any work: is there a token, does the hub take it, and is the repository free, empty or ours?
    push         uploads the folder when it is whole on the disk, and returns the address of the commit

A repository is ours where it holds the mark of an export (`targets.py`: conversion.json). A push replaces the files
that the mark lists and no others. A new repository gets the mark first, so that the files of a push that failed half
way are known as ours, too.

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
from megatron_powerflow.hub.failures import hub_errors, one_line, silence_hub
from megatron_powerflow.hub.names import is_repository
from megatron_powerflow.parallel.agreement import main_first
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.targets import MARK_NAME, TargetFolder

OPTION = "--push-to-hub"
ANSWER_SECONDS = 10
INITIAL_FILES = {".gitattributes"}  # of a repository that the hub has just made
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Push:
    """Describes a push that `check_push` has allowed.

    head: the commit that it replaces; None where there is no repository yet. marked: whether the repository holds the
    mark of an export. replaced: the files that the mark lists.
    """

    repository: str
    private: bool
    head: str | None = None
    marked: bool = False
    replaced: tuple[str, ...] = ()


def check_push(repository: str, private: bool, target: TargetFolder, launch: Launch) -> Push:
    """Asks the hub whether the repository may be overwritten by an export to `target`. Changes nothing.

    Collective. Raises UserError on all processes alike where it may not.
    """

    def find() -> str:
        return json.dumps(asdict(_check(repository, private, target.made_by)))

    def take_up(text: str) -> Push:
        values = json.loads(text)
        return Push(**values | {"replaced": tuple(values["replaced"])})

    return main_first(launch, "push", find, take_up)


def _check(repository: str, private: bool, made_by: str) -> Push:
    from huggingface_hub import HfApi, constants, errors, get_token

    silence_hub()
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
    except hub_errors() as error:
        raise UserError(
            f"{name}: {hub} did not say whether it is there ({one_line(error)}); leave {OPTION} out and push the "
            "folder later, where there is a network"
        ) from None
    try:
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    except hub_errors() as error:
        raise UserError(f"{name}: {hub} does not take the token ({one_line(error)}); {LOG_IN}") from None
    if role == "read":
        raise UserError(f"{name}: the token may read only; {LOG_IN} with one that may write")
    if info is None:
        return Push(repository, private)
    if private and not info.private:
        raise UserError(f"{name}: the repository is there and public; --private is for a new one: leave it out")
    hub_files = {sibling.rfilename for sibling in info.siblings or ()}
    if hub_files <= INITIAL_FILES:
        return Push(repository, private, info.sha)
    mark = _mark(repository, info.sha, name) if MARK_NAME in hub_files else {}
    if mark.get("made_by") != made_by:
        some = ", ".join(sorted(hub_files - INITIAL_FILES)[:3])
        raise UserError(f"{name}: the repository holds {some}, and no {made_by} wrote it; name one that is not there")
    listed = [file for file in mark.get("files") or () if file in hub_files]
    return Push(repository, private, info.sha, True, tuple(listed))


def _mark(repository: str, revision: str | None, name: str) -> Mapping[str, Any]:
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = hf_hub_download(repository, MARK_NAME, revision=revision, local_dir=folder)
            values = json.loads(Path(path).read_bytes())
        except hub_errors() as error:
            raise UserError(f"{name}: its {MARK_NAME} cannot be read ({one_line(error)}); try again later") from None
    return values if isinstance(values, dict) else {}


def push(folder: Path, planned: Push) -> str:
    """Uploads the folder's files and returns the address of the commit.

    Raises UserError that says how to push later; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    files = _whole(folder)
    api, message = HfApi(), "powerflow export"
    head = planned.head
    try:
        if head is None:
            api.create_repo(planned.repository, private=planned.private or None)
        if not planned.marked:
            mark = folder / MARK_NAME
            head = api.upload_file(
                path_or_fileobj=mark,
                path_in_repo=MARK_NAME,
                repo_id=planned.repository,
                commit_message=f"{message}: begun",
                parent_commit=head,
            ).oid
        commit = api.upload_folder(
            repo_id=planned.repository,
            folder_path=folder,
            commit_message=message,
            parent_commit=head,
            delete_patterns=[glob.escape(file) for file in planned.replaced if file not in files] or None,
        )
    except hub_errors() as error:
        later = shlex.join(["hf", "upload", planned.repository, str(folder), "."])
        raise UserError(
            f"{OPTION} {planned.repository}: the push failed ({one_line(error)}); the export is whole in {folder}, and "
            f"`{later}` pushes it later"
        ) from None
    return commit.commit_url


def _whole(folder: Path) -> list[str]:
    """Returns the files of the export, by its mark. Raises UserError where one is gone or a weight file is damaged."""
    files = json.loads((folder / MARK_NAME).read_bytes())["files"]
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise UserError(f"{folder}: {absent[0]} is gone since it was written; nothing was pushed: export again")
    SafetensorsFolder(folder)
    return files
