"""A kill while a file is written leaves one that is known as ours; nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_powerflow.checkpoint.first_files import CONFIG_MARK, not_ours, remove_cut_off_files
from megatron_powerflow.cli.runs import stop
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.responses import RESPONSES_NAME, append_responses
from megatron_powerflow.journal import append_lines
from megatron_powerflow.whole_files import is_partial_of, own_file, whole_file, write_file
from tests.conftest import REPOSITORY


class Killed(BaseException):
    pass


def test_what_is_left_of_a_killed_write_is_known_and_a_users_file_is_not(tmp_path):
    with whole_file(tmp_path / "config.yaml"):
        (partial,) = tmp_path.iterdir()
        assert is_partial_of(partial.name, ("metrics.jsonl", "config.yaml"))
        assert not is_partial_of(partial.name, ("metrics.jsonl",))
    for name in (
        ".config.yaml.old.partial",
        ".config.yaml.partial",
        "config.yaml.partial",
        ".config.yaml.MY_NOTES.partial",
    ):
        assert not is_partial_of(name, ("config.yaml",))


def test_only_what_we_made_is_swept_away(tmp_path):
    (tmp_path / ".config.yaml.x1_2ab3c.partial").write_text("half a")
    (tmp_path / ".config.yaml.old.partial").write_text("precious")
    assert not_ours(tmp_path) == [".config.yaml.old.partial"]
    remove_cut_off_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".config.yaml.old.partial"]


def write_half(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"step_0")
        raise Killed


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "latest"
    write_file(path, "step_000001\n")
    with pytest.raises(Killed):
        write_half(path)
    assert path.read_text() == "step_000001\n"
    assert [left.name for left in tmp_path.iterdir()] == ["latest"]


def test_a_kill_in_any_folder_of_a_run_leaves_nothing_for_good(tmp_path):
    """The next start takes away what was half-written under a name of ours, in all three places where a run writes."""
    (tmp_path / "config.yaml").write_text(CONFIG_MARK)
    ours = (
        ".metrics.jsonl.x1_2ab3c.partial",
        ".curves.png.x1_2ab3c.partial",
        "checkpoints/.latest.x1_2ab3c.partial",
        "rollouts/.step_000005.jsonl.bhf8i7lg.partial",
    )
    others = ("rollouts/.notes.jsonl.bhf8i7lg.partial", "rollouts/step_000005.jsonl", "checkpoints/.latest.old.partial")
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    remove_cut_off_files(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"config.yaml", *others}


@pytest.mark.parametrize("target", ["there.txt", "nowhere.txt"])
def test_nothing_is_written_through_a_link(tmp_path, target):
    """A run's folder may come from a stranger, and a journal in it be a link to any file of the user's."""
    (tmp_path / "there.txt").write_text("the user's own\n")
    link = tmp_path / "events.jsonl"
    link.symlink_to(target)
    with pytest.raises(OSError, match="a link to a file of another name"):
        own_file(link)
    with pytest.raises(OSError, match="a link"):
        append_lines(link, [{"step": 1}])
    link.rename(tmp_path / RESPONSES_NAME)
    with pytest.raises(OSError, match="a link"):
        append_responses(tmp_path, [{"step": 1}])
    assert (tmp_path / "there.txt").read_text() == "the user's own\n"
    assert not (tmp_path / "nowhere.txt").exists()


def test_a_journal_that_lies_on_another_disk_under_its_name_is_written_there(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "events.jsonl"
    link.symlink_to("disk/events.jsonl")
    append_lines(link, [{"step": 1}])
    assert (tmp_path / "disk" / "events.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_is_not_asked_to_stop_through_a_link(tmp_path):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "stop").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="a link to a file of another name"):
        stop(REPOSITORY / "examples" / "configs" / "local.yaml", [f"run.output_dir={tmp_path}"])
    assert not (tmp_path / "nowhere").exists()
