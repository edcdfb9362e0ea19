"""Which checkpoint a run continues when `latest`, or a file that it leads to, is not what it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from megatron_powerflow.checkpoint.choice import Choice, choose, flaw_of, is_sound
from megatron_powerflow.checkpoint.digests import write_sums
from megatron_powerflow.checkpoint.folder import find_checkpoint
from megatron_powerflow.checkpoint.state import Proof, RunProgress, progress_text, read_proof
from megatron_powerflow.errors import UserError


def add_checkpoint(run: Path, step: int, *, skipped: int = 0, finite: bool = True, old_format: bool = False) -> Path:
    checkpoint = run / "checkpoints" / f"step_{step:06d}"
    (checkpoint / "policy").mkdir(parents=True)
    (checkpoint / "policy" / "__0_0.distcp").write_bytes(bytes(2**21))
    (checkpoint / "config.yaml").write_text("a: 1\n")
    text = progress_text(RunProgress(step, step * 4, skipped, skipped, "abc"), Proof("1", "", "2", step, finite))
    if old_format:
        values = json.loads(text) | {"format": 1}
        del values["proof"]
        text = json.dumps(values)
    (checkpoint / "progress.json").write_text(text)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    digests = {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    write_sums(checkpoint, digests)
    return checkpoint


@pytest.fixture
def run(tmp_path) -> Path:
    for step in (2, 4, 6):
        add_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step_000006\n")
    return tmp_path


def taken(choice: Choice) -> str:
    assert choice.checkpoint is not None
    return choice.checkpoint.name


def test_latest_counts_not_the_newest(run):
    (run / "checkpoints" / "latest").write_text("step_000004\n")
    assert choose(run) == Choice(run / "checkpoints" / "step_000004")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        (b"", "names no checkpoint"),
        (b"\xff\x00\x00", "names no checkpoint"),
        (b"../../etc", "names no checkpoint"),
        (b"step_000099\n", "names step_000099, which is not there"),
    ],
)
def test_without_a_good_latest_the_newest_whole_one_is_taken_and_that_is_said(run, content, words):
    pointer = run / "checkpoints" / "latest"
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
    choice = choose(run)
    assert taken(choice) == "step_000006"
    (notice,) = choice.notices
    assert words in notice
    assert "continues from the newest whole checkpoint, step_000006" in notice
    (run / "checkpoints" / "step_000006" / "config.yaml").unlink()
    assert taken(choose(run)) == "step_000004"


@pytest.mark.parametrize("name", ["SHA256SUMS", "progress.json", "config.yaml", "policy/__0_0.distcp"])
@pytest.mark.parametrize("how", ["missing", "empty", "garbled"])
def test_a_file_that_is_not_what_was_written_leads_to_the_checkpoint_before(run, name, how):
    path = run / "checkpoints" / "step_000006" / name
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if how == "empty" else b"x" * 10)
    choice = choose(run)
    assert taken(choice) == "step_000004"
    assert "step_000006, which latest names, is not whole" in choice.notices[0]
    assert name in choice.notices[0]
    assert "continues from step_000004" in choice.notices[0]


def test_checkpoints_of_a_run_that_diverged_are_not_taken_by_themselves(run):
    add_checkpoint(run, 8, skipped=2)
    add_checkpoint(run, 10, finite=False)
    assert not is_sound(run / "checkpoints" / "step_000008")
    assert not is_sound(run / "checkpoints" / "step_000010")
    assert taken(choose(run)) == "step_000006"
    (run / "checkpoints" / "latest").unlink()
    assert taken(choose(run)) == "step_000006"
    assert taken(choose(run, "step_000008")) == "step_000008"


def test_a_run_of_which_nothing_is_whole_does_not_begin_anew(run):
    for path in (run / "checkpoints").glob("step_*"):
        (path / "config.yaml").write_text("b: 2\n")
    with pytest.raises(UserError) as caught:
        choose(run)
    assert all(f"step_00000{step}: config.yaml is damaged" in str(caught.value) for step in (2, 4, 6))
    assert "name a new run.output_dir to begin anew" in str(caught.value)
    for path in (run / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="latest names step_000006, and no checkpoint is there"):
        choose(run)
    (run / "checkpoints" / "latest").unlink()
    assert choose(run) == Choice(None)
    (run / "checkpoints" / "step_000006.damaged").mkdir()
    with pytest.raises(UserError, match=r"there are only step_000006\.damaged"):
        choose(run)


def test_one_that_is_named_is_taken_or_refused(run):
    choice = choose(run, "step_000002")
    assert taken(choice) == "step_000002"
    assert "step_000004, step_000006 stay until they are written again" in choice.notices[0]
    with pytest.raises(UserError, match="no checkpoint step_000003; there are step_000002, step_000004, step_000006"):
        choose(run, "step_000003")
    (run / "checkpoints" / "step_000002" / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config\.yaml is missing; name another one"):
        choose(run, "step_000002")


def test_a_checkpoint_of_the_first_format_is_taken_and_said_to_be_compared_with_less(run):
    add_checkpoint(run, 8, old_format=True)
    (run / "checkpoints" / "latest").write_text("step_000008")
    choice = choose(run)
    assert taken(choice) == "step_000008"
    assert read_proof(choice.checkpoint) is None
    assert "of format 1" in choice.notices[0]


@pytest.mark.parametrize("proof", [None, [], {}, {"weights": 1}, {"weights": "1", "moments": "x"}])
def test_a_proof_that_is_none_is_a_flaw(run, proof):
    path = run / "checkpoints" / "step_000006" / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"proof": proof}))
    files = [item for item in path.parent.rglob("*") if item.is_file() and item.name != "SHA256SUMS"]
    digests = {str(item.relative_to(path.parent)): hashlib.sha256(item.read_bytes()).hexdigest() for item in files}
    write_sums(path.parent, digests)
    assert "its proof is damaged" in (flaw_of(path.parent) or "")


def test_a_run_of_which_no_checkpoint_became_latest_is_no_model_until_one_is_named(run):
    """Of a run that skipped every step: training would refuse it too, and an HF folder it is not."""
    (run / "checkpoints" / "latest").unlink()
    with pytest.raises(UserError, match=r"none of its checkpoints became `latest` .*name one of them: \S+step_000006"):
        find_checkpoint(run)
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)
    assert find_checkpoint(run) is None
