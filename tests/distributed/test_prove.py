"""A right layout is proved and a wrong one is not: the table of benchmarks/proofs.py, each fault that matters planted.

Also what a user sees of the command, and what it leaves behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from benchmarks.proofs import ROWS, try_row
from tests.conftest import REPOSITORY, run_cli
from tests.published_configs import PUBLISHED

# these two run in CI, with three faults each; all of them are long together
IN_CI = {
    "TP2 + SP, learned log Z'": (
        "tp: a product is not summed",
        "sp: norms' gradients not summed",
        "log Z': gradient counted twice",
    ),
    "PP2 x VPP2": ("pp: rows of the first stage", "pp: layers of another stage", "resume: moments lost"),
}


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row.name in IN_CI], ids=lambda row: row.name)
def test_a_layout_is_proved_and_its_faults_are_found(tmp_path, row):
    tried = try_row(row, tmp_path, IN_CI[row.name])
    assert tried.holds, tried.lines
    assert tried.found_by.keys() == set(IN_CI[row.name])
    assert tried.is_right, tried.found_by


@pytest.mark.long
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_layout_is_proved_and_every_fault_that_it_can_have_is_found(tmp_path, row):
    tried = try_row(row, tmp_path)
    assert tried.holds, tried.lines
    assert len(tried.found_by) >= 2
    assert tried.is_right, tried.found_by


@pytest.fixture
def config(tmp_path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(PUBLISHED["Qwen/Qwen3-8B"]))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {model}}}
prompts: {{path: prompts_that_are_elsewhere.jsonl}}
run: {{output_dir: {tmp_path / "run"}}}
"""
    )
    return path


@pytest.mark.slow
def test_the_command_says_what_it_proves_and_leaves_nothing(config, tmp_path):
    """Of the model only config.json is there, and no prompts."""
    scratch, out = tmp_path / "scratch", tmp_path / "proof.json"
    scratch.mkdir()
    done = run_cli("prove", config, "--json", out, env={**os.environ, "TMPDIR": str(scratch)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes = tp 1 x cp 1 x pp 1 x dp 2" in done.stdout
    assert "layout: makes step 3 of 3" in done.stdout
    assert "hidden 4096 as 64" in done.stdout
    written = json.loads(out.read_text())
    assert written["holds"]
    assert len(written["lines"]) == 11
    assert all(line["largest"] <= line["bound"] for line in written["lines"])
    assert list(scratch.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model", "proof.json", "scratch"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise OSError('the disk of rank 1')", "OSError: the disk of rank 1"),
        ("os.kill(os.getpid(), 9)", "ended with -9"),
    ],
    ids=["raises", "killed"],
)
def test_a_layout_that_fails_ends_with_1_and_says_where(config, tmp_path, monkeypatch, fault, words):
    """A fault that ends a rank, through the command itself; the others do not wait for it. They fail of it, too, and
    are not taken for the cause: the looks are so far apart that both have ended by the first."""
    from typer.testing import CliRunner

    from megatron_powerflow.cli import app
    from megatron_powerflow.prove import proof

    script = tmp_path / "broken.py"
    script.write_text(
        f"""
import os, sys
from megatron_powerflow.parallel.initialize import prepare_imports
prepare_imports()
from megatron_powerflow.prove import forks, rank
def broken(plan, session, saver):
    if session.groups.rank == 1:
        {fault}
    session.groups.control.barrier().wait()
rank._save = broken
forks.LOOK_SECONDS = 1.5
sys.exit(forks.main(sys.argv[1:]))
"""
    )
    monkeypatch.setattr(proof, "prove", partial(proof.prove, command=(sys.executable, str(script))))
    found = CliRunner().invoke(app, ["prove", str(config), "--world-size", "2"])
    assert found.exit_code == 1
    assert "rank 1 of the part 'layout', as it saves:" in found.output, found.output
    assert words in found.output
    assert "NOT PROVED" in found.output


@pytest.mark.long
def test_a_rank_that_stands_still_is_named(config, tmp_path):
    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.prove.proof import prove, subject_of

    script = tmp_path / "still.py"
    script.write_text(
        """
import sys, time
from megatron_powerflow.parallel.initialize import prepare_imports
prepare_imports()
from megatron_powerflow.prove import forks, rank
export = rank._export
def still(plan, session):
    if session.groups.rank == 1:
        time.sleep(1000)
    export(plan, session)
rank._export = still
sys.exit(forks.main(sys.argv[1:]))
"""
    )
    subject = subject_of(load_config(config, ["run.hang_seconds=30"]), 2, full=False)
    failure = prove(subject, lambda phase: None, command=(sys.executable, str(script))).failure
    assert failure is not None
    assert (failure.part, failure.phase) == ("layout", "exports")
    assert failure.words[0] == "stood still for 30 s"


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.long) for number in (signal.SIGTERM, signal.SIGKILL))],
)
def test_no_process_and_no_folder_outlives_the_command(config, tmp_path, number):
    """Of SIGKILL the temporary folder is left, which nobody can help."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_powerflow.cli", "prove", str(config), "--world-size", "2"],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "layout: draws" in line:
            break
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) == 3  # the one that forks, and two ranks
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert "Traceback" not in said
    deadline = time.monotonic() + 20
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in started):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert number == signal.SIGKILL or list(scratch.iterdir()) == []


REFUSED = {
    "too many": (["parallel.tp=8", "parallel.pp=2", "--world-size", "64", "--full"], "at most 32"),
    "impossible": (["parallel.tp=3"], "does not divide"),
    "no model": (["model.hf_path=nowhere"], "no such folder"),
    "a file": (["--json", "config.yaml"], "did not write it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_proved_is_refused_with_2(config, case):
    arguments, words = REFUSED[case]
    done = run_cli("prove", config, *(str(config) if word == "config.yaml" else word for word in arguments))
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr


def test_it_starts_its_processes_itself(config):
    done = run_cli("prove", config, num_processes=2)
    assert "starts its own processes" in done.stderr
