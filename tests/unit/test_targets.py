"""What may be replaced: only what the same kind of command wrote, and all of it. What a kill leaves, at each point."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from megatron_powerflow import targets
from megatron_powerflow.errors import UserError
from megatron_powerflow.targets import MARK_NAME, TargetFolder, export_target, file_refusals, starts_with_line_of
from megatron_powerflow.whole_files import write_file


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder with a digest of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def export(out: Path, content: str, made_by: str = "powerflow export") -> Path:
    target = TargetFolder(out, made_by)
    partial = target.begin()
    (partial / "config.json").write_text(content)
    (partial / "templates").mkdir()
    (partial / "templates" / "a.jinja").write_text(content)
    target.publish(source="a run")
    return out


def test_an_export_is_replaced_by_an_export_and_by_nothing_else(tmp_path):
    out = export(tmp_path / "deep" / "out", "one")
    mark = json.loads((out / MARK_NAME).read_text())
    assert mark == {
        "made_by": "powerflow export",
        "source": "a run",
        "files": ["conversion.json", "config.json", "templates/a.jinja"],
    }
    export(out, "two")
    assert (out / "config.json").read_text() == "two"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(UserError, match="no conversion wrote it"):
        export(out, "three", made_by="conversion")
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", "four")


def wrong_targets(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """name -> (path, what the refusal says)."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("precious")
    models = tmp_path / "models"
    export(models / "a", "a")
    export(models / "b", "b")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(models / "a")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    export(tmp_path / "annotated", "x")
    (tmp_path / "annotated" / "notes.txt").write_text("precious")
    export(tmp_path / "with_folder", "x")
    (tmp_path / "with_folder" / "results").mkdir()
    export(tmp_path / "with_link", "x")
    (tmp_path / "with_link" / "config.json").unlink()
    (tmp_path / "with_link" / "extra").symlink_to(models)
    foreign = tmp_path / "foreign_mark"
    foreign.mkdir()
    (foreign / MARK_NAME).write_text('{"source": "my own file"}')
    for name, content in (("damaged_mark", "{"), ("list_mark", "[1]"), ("deep_mark", "[" * 100_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / MARK_NAME).write_text(content)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / MARK_NAME).write_text('{"made_by": "powerflow export", "files": null}')
    for beside in ("partial", "old"):
        (tmp_path / f"x.{beside}").mkdir()
        (tmp_path / f"x.{beside}" / "thesis.tex").write_text("precious")
    return {
        "notes": (tmp_path / "notes", "no powerflow export wrote it (it holds thesis.tex)"),
        "several models": (models, "no powerflow export wrote it"),
        "file": (tmp_path / "file", "is no folder"),
        "below a file": (tmp_path / "file" / "out", "is no folder"),
        "link": (tmp_path / "link", "a link to"),
        "broken link": (tmp_path / "broken", "a link to"),
        "link in a circle": (tmp_path / "circle", "a link to"),
        "below a circle": (tmp_path / "circle" / "out", "cannot be looked at"),
        "with notes": (tmp_path / "annotated", "holds what no powerflow export wrote (notes.txt)"),
        "with a folder": (tmp_path / "with_folder", "holds what no powerflow export wrote (results)"),
        "with a link": (tmp_path / "with_link", "holds what no powerflow export wrote (extra)"),
        "a mark of another": (foreign, "no powerflow export wrote it"),
        "a damaged mark": (tmp_path / "damaged_mark", "no powerflow export wrote it"),
        "a list": (tmp_path / "list_mark", "no powerflow export wrote it"),
        "a nested list": (tmp_path / "deep_mark", "no powerflow export wrote it"),
        "an unfinished one": (tmp_path / "unfinished", "no finished work"),
        "partial in the way": (tmp_path / "x", "x.partial is in the way"),
        "old in the way": (tmp_path / "x", "x.old is in the way"),
        "a name that is too long": (tmp_path / ("n" * 300), "cannot be looked at"),
        "current folder": (Path("."), "is not to be replaced"),
        "its parent": (Path(".."), "is not to be replaced"),
        "current folder, far around": (tmp_path / "notes" / ".." / "work", "is not to be replaced"),
        "home": (Path.home(), "is not to be replaced"),
        "everything": (Path("/"), "is not to be replaced"),
        "a file system": (Path("/proc"), "the top of a file system"),
        "a source": (tmp_path / "source", "lies in the other"),
        "in a source": (tmp_path / "source" / "out", "lies in the other"),
        "around a source": (tmp_path, "lies in the other"),
        "a run": (tmp_path / "run", "is not to be replaced"),
    }


def test_wrong_targets_are_refused_and_nothing_is_lost(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    cases = wrong_targets(tmp_path)
    export(tmp_path / "source", "s")
    export(tmp_path / "run", "r")  # even what an export wrote, where it is one of these
    before = listing(tmp_path)
    for name, (path, words) in cases.items():
        source, run = (tmp_path / "source",) * ("source" in name), (tmp_path / "run",) * (name == "a run")
        found = export_target(path).refusals(apart_from=source, not_over=run)
        assert any(words in text for text in found), (name, found)
        if name not in ("a source", "in a source", "around a source", "a run"):
            with pytest.raises(UserError):
                export_target(path).begin()
    assert listing(tmp_path) == before
    assert not export_target(tmp_path / "run" / "hf_export").refusals(not_over=[tmp_path / "run"])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("point", range(1, 40))
def test_a_kill_at_any_point_loses_neither_the_older_export_nor_the_way_to_a_new_one(tmp_path, monkeypatch, point):
    """The process dies before its n-th change of the disk; the older export is there, or in OUT.old, or replaced."""
    out, count = export(tmp_path / "out", "one"), 0

    def dying(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= point:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "write_text"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(targets.shutil, "rmtree", dying(targets.shutil.rmtree))
        try:
            export(out, "two")
            died = False
        except Killed:
            died = True
    assert died == (count >= point)
    place = out if out.exists() else out.with_name("out.old")
    content = (place / "config.json").read_text()
    assert content == (place / "templates" / "a.jinja").read_text()
    assert content in ("one", "two")
    export(out, "three")
    assert (out / "config.json").read_text() == "three"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if point == 39:
        assert not died  # all points were seen


def test_a_refused_or_failed_export_after_a_kill_brings_the_older_one_back(tmp_path):
    """Killed between the two renames; the next try puts it under its name before it does anything else."""
    out = export(tmp_path / "out", "one")
    out.rename(tmp_path / "out.old")
    target = export_target(out)
    target.begin()
    assert (out / "config.json").read_text() == "one"
    target.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_came_to_stand_there_meanwhile_stays(tmp_path):
    target = export_target(tmp_path / "out")
    partial = target.begin()
    (partial / "config.json").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds thesis.tex"):
        target.publish()
    assert (tmp_path / "out" / "thesis.tex").read_text() == "precious"


def test_a_file_is_replaced_only_by_its_like(tmp_path):
    is_ours = starts_with_line_of(("id", "log_probs"), ("id", "text"))
    path = tmp_path / "out.jsonl"
    assert not file_refusals(path, is_ours)
    for fine in ("", '{"id": "a", "log_probs": []}\n{', '{"id": "a", "log_pr', '{"i', '{"id": 1, "text": "x"}'):
        path.write_text(fine)
        assert not file_refusals(path, is_ours), fine
    for other in (
        '{"id": "a", "prompt": "x"}\n',
        "notes\n",
        "notes",
        "[1]\n",
        "null\n",
        '{"id": 1, "log_probs": 2, "x": 3}\n',
        '{"id": "a", "prompt": "one line without an end"}',
    ):
        path.write_text(other)
        assert "this command did not write it" in file_refusals(path, is_ours)[0], other
        assert path.read_text() == other
    assert "a folder" in file_refusals(tmp_path, is_ours)[0]
    assert "no folder" in file_refusals(tmp_path / "none" / "x", is_ours)[0]
    (tmp_path / "link").symlink_to(path)
    assert "a link" in file_refusals(tmp_path / "link", is_ours)[0]


def test_a_file_is_written_whole_beside_what_has_its_names(tmp_path):
    (tmp_path / "a.json.partial").write_text("precious")
    write_file(tmp_path / "a.json", b"{}")
    write_file(tmp_path / "a.json", b"[]")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a.json": b"[]",
        "a.json.partial": b"precious",
    }
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o22))


def test_reports_curves_and_proofs_replace_only_their_like(tmp_path):
    """Each is told by what it writes into itself; a picture or page of the user's that has the name stays."""
    from megatron_powerflow.converter.compare import card_refusals
    from megatron_powerflow.report.curves import draw_curves
    from megatron_powerflow.report.page import build_report

    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "loss": 0.5}\n')
    (run / "config.yaml").write_text("")
    mine = {"index.html": "<p>mine</p>", "mine.png": "mine", "card.json": '{"name": "visiting card"}', "notes.txt": "x"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="this command did not write it"):
        build_report([run], tmp_path, "powerflow report")
    with pytest.raises(UserError, match="this command did not write it"):
        draw_curves([run], tmp_path / "mine.png")
    with pytest.raises(UserError, match=r"ends in \.png"):
        draw_curves([run], tmp_path / "notes.txt")
    assert "this command did not write it" in card_refusals(tmp_path / "card.json")[0]
    assert mine == {name: (tmp_path / name).read_text() for name in mine}
    for _ in range(2):
        draw_curves([run], tmp_path / "new" / "curves.png")
    (tmp_path / "card.json").write_text(json.dumps(dict.fromkeys(("a", "b", "equal", "sha256", "differences"))))
    assert not card_refusals(tmp_path / "card.json")
