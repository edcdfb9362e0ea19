"""What `powerflow export --push-to-hub` may write on the hub, and what is left where it fails; a real HTTP server."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from megatron_powerflow import cli
from megatron_powerflow.cli import leaving
from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.push import check_push, push
from megatron_powerflow.parallel.launch import ALONE
from megatron_powerflow.targets import export_target
from tests.hub_server import READ_TOKEN, TOKEN

NAME = "me/sharp"


@pytest.fixture
def token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def exported(tiny_model, tmp_path) -> Path:
    """A folder as an export leaves it."""
    out = tmp_path / "exported"
    write_export(out, tiny_model("llama"))
    return out


def write_export(out: Path, model: Path) -> None:
    target = export_target(out)
    shutil.copytree(model, target.begin(), dirs_exist_ok=True)
    target.publish(source="a run")


def judged(out: Path, *, private: bool = False, name: str = NAME):
    return check_push(name, private, export_target(out), ALONE)


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        judged(*arguments, **options)
    (violation,) = caught.value.violations
    return violation


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_holds_the_folder_and_the_commit_is_told(hub, token, exported, private):
    asked = judged(exported, private=private)
    assert NAME not in hub.repositories  # judging changes nothing
    url = push(exported, asked)
    repository = hub.repositories[NAME]
    assert repository.private == private
    assert url == f"{hub.url}/{NAME}/commit/{repository.head}"
    assert set(repository.files) == names_in(exported) | {".gitattributes"}
    assert repository.files["model.safetensors"] == (exported / "model.safetensors").read_bytes()


def test_an_export_replaces_the_files_of_an_export_and_no_others(hub, token, exported, tiny_model):
    push(exported, judged(exported))
    files = hub.repositories[NAME].files
    hub.add(NAME, files | {"README.md": b"written on the hub"})
    shutil.rmtree(exported)
    write_export(exported, tiny_model("mistral"))
    push(exported, judged(exported))
    pushed = hub.repositories[NAME].files
    assert pushed["README.md"] == b"written on the hub"
    assert pushed["model.safetensors"] == (exported / "model.safetensors").read_bytes()
    assert set(pushed) == names_in(exported) | {".gitattributes", "README.md"}


def test_files_of_the_older_export_that_the_new_one_lacks_go(hub, token, exported):
    push(exported, judged(exported))
    (exported / "generation_config.json").unlink()
    kept = names_in(exported)
    model = exported.with_name("less")
    shutil.move(exported, model)
    (model / "conversion.json").unlink()
    write_export(exported, model)
    push(exported, judged(exported))
    assert set(hub.repositories[NAME].files) == kept | {".gitattributes"}


def test_an_empty_repository_is_written_and_a_foreign_one_refused(hub, token, exported):
    hub.add(NAME, {".gitattributes": b""})
    push(exported, judged(exported))
    assert "model.safetensors" in hub.repositories[NAME].files
    hub.add("me/other", {"README.md": b"mine", "model.safetensors": b"mine"})
    text = refusal(exported, name="me/other")
    assert "holds README.md, model.safetensors, and no powerflow export wrote it" in text
    hub.add("me/converted", {"conversion.json": b'{"made_by": "conversion"}'})
    hub.add("me/odd", {"conversion.json": b"[]"})
    for name in ("me/converted", "me/odd"):
        assert "no powerflow export wrote it; name one that is not there" in refusal(exported, name=name)
    assert "--private is for a new one" in refusal(exported, private=True)


@pytest.mark.parametrize("name", ["sharp", "../x", "a/b/c", "a b/c", "hf://a/b", "a/b@main", ""])
def test_a_malformed_name_is_refused_before_anything_is_asked(hub, token, exported, name):
    assert "a name is OWNER/NAME" in refusal(exported, name=name)
    assert not hub.asked


def test_who_may_not_write_hears_it_before_any_work(hub, exported, monkeypatch):
    assert "there is no token" in refusal(exported)
    assert not hub.asked
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    assert "does not take the token" in refusal(exported)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert "the token may read only" in refusal(exported)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "leave --push-to-hub out and push the folder later, where there is a network" in refusal(exported)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(exported)


@pytest.mark.parametrize("refused", ["/api/repos/create", "/large/", "/commit/"])
def test_a_push_that_fails_keeps_the_export_and_can_be_made_again(hub, token, exported, refused):
    asked, before = judged(exported), names_in(exported)
    hub.refuses = refused
    with pytest.raises(UserError) as caught:
        push(exported, asked)
    (text,) = caught.value.violations
    assert f"the export is whole in {exported}, and `hf upload {NAME} {exported} .` pushes it later" in text
    assert names_in(exported) == before
    hub.refuses = None
    push(exported, judged(exported))
    assert set(hub.repositories[NAME].files) == before | {".gitattributes"}


def test_what_was_pushed_by_another_meanwhile_is_not_overwritten(hub, token, exported):
    hub.add(NAME, {".gitattributes": b""})
    asked = judged(exported)
    hub.add(NAME, {".gitattributes": b"", "README.md": b"another's"})
    with pytest.raises(UserError, match="the push failed"):
        push(exported, asked)
    assert set(hub.repositories[NAME].files) == {".gitattributes", "README.md"}


def test_a_folder_that_is_not_whole_is_not_pushed(hub, token, exported):
    asked = judged(exported)
    weights = exported / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        push(exported, asked)
    weights.unlink()
    with pytest.raises(UserError, match=r"model.safetensors is gone since it was written; nothing was pushed"):
        push(exported, asked)
    assert NAME not in hub.repositories


def test_private_without_a_push_is_refused(capsys):
    arguments = ["export", "runs/nothing", "--out", "nowhere", "--private"]
    with pytest.raises(SystemExit) as caught:
        leaving.exit_codes(lambda: cli.app(arguments, standalone_mode=False))
    assert caught.value.code == 2
    assert "--private has no effect with no --push-to-hub; remove it" in capsys.readouterr().err
