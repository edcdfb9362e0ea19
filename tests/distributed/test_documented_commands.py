"""The commands of the documentation, run as they stand: those whose block needs nothing that a machine may not have.

In the order of the pages, in one folder that looks like the repository: a small random model stands in the place of
SmolLM2, and the runs that the pages start from are made first. Left out: commands that other tests run
(`unit/test_docs.py` says which).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.documents import commands, pages
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

COMMANDS = [command for page in pages() for command in commands(page)]
LOCAL = "examples/configs/local.yaml"
QUICK = ["parallel.pp=1", "metrics.wandb=off", "run.num_steps=2"]
QUICK += ["evaluation.num_prompts=2", "evaluation.num_responses=2"]


def run_here(words: Sequence[str], folder: str) -> tuple[int, str]:
    """(exit code, what it said) of a `powerflow` command or a Python file, in this process, as if begun in `folder`."""
    from megatron_powerflow.cli import app
    from megatron_powerflow.cli.leaving import exit_codes

    said, before, argv = io.StringIO(), os.getcwd(), sys.argv
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                if words[0] == "powerflow":
                    sys.argv = list(words)
                    exit_codes(lambda: app(list(words[1:]), standalone_mode=False))
                else:
                    sys.argv = list(words[1:])
                    runpy.run_path(words[1], run_name="__main__")
            except SystemExit as ended:
                return ended.code or 0, said.getvalue()
    finally:
        sys.argv = argv
        os.chdir(before)
    return 0, said.getvalue()


@pytest.fixture(scope="module")
def repository(tmp_path_factory, gloo) -> Path:
    """A folder with what the pages name."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("examples", "megatron_powerflow", "tools"):
        (folder / name).symlink_to(REPOSITORY / name)
    make_tiny_model(folder / "models" / "SmolLM2-135M-Instruct", "llama", max_position_embeddings=8192)
    for run, more in (("local", []), ("saved", ["rollout.save=true"])):
        words = ["powerflow", "train", LOCAL, *QUICK, *more, f"run.output_dir=runs/{run}"]
        code, said = gloo.run(1, run_here, words, str(folder))[0]
        assert code == 0, said
    write_data(folder)
    return folder


def write_data(folder: Path) -> None:
    """The user's own files on the pages."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "one and one", "response": "is two"}, {"prompt": "w5 w6", "response_token_ids": [7, 8, 2]}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part in (1, 2):
        numina = [
            {"source": "x", "problem": f"What is {n} times {part}?", "solution": f"It is \\boxed{{{n * part}}}."}
            for n in range(3, 9)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(numina), folder / f"part{part}.parquet")
    math500 = {"problem": "What is 3 times 2?", "answer": "6", "subject": "x", "level": 1, "unique_id": "a"}
    (folder / "math500.jsonl").write_text(json.dumps(math500) + "\n")
    poem = "\n".join(f"line {n} of a poem of some length" for n in range(8))
    (folder / "poems.csv").write_text(f'poem\n"{poem}"\n')
    story = [{"snippet": " ".join(f"Sentence {n} of a story goes on." for n in range(30))}]
    parquet.write_table(pyarrow.Table.from_pylist(story), folder / "bookmia.parquet")
    (folder / "jokes.jsonl").write_text(json.dumps({"title": "Why did it cross?", "selftext": "To get there."}) + "\n")


def test_the_commands_of_the_pages(repository, gloo):
    done: set[str] = set()
    for command in COMMANDS:
        if command.block.needs or command.text in done or command.words[0] not in ("powerflow", "python"):
            continue
        done.add(command.text)
        if command.words[1] == "examples/own_objective.py":  # adds to a table that this process has read
            run = subprocess.run([sys.executable, *command.words[1:]], cwd=repository, capture_output=True, text=True)
            code, said = run.returncode, run.stdout + run.stderr
        else:
            code, said = gloo.run(1, run_here, command.words, str(repository))[0]
        assert code == 0, f"{command.block.place}: {command.text}\n{said}"
    assert len(done) > 20
    assert (repository / "report" / "index.html").is_file()


def this_environment(folder: Path, extras: str) -> Path:
    """An environment as tools/environment.sh wants it, which is the one of this process: nothing is installed."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    sums = ["bash", "-c", 'cat setup.py constraints.txt <(echo "$1") | cksum', "_", extras]
    stamp = subprocess.run(sums, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    (folder / "installed").write_text(stamp)
    return folder


@pytest.mark.long
def test_the_sweep_over_alpha(tmp_path):
    """examples/sweep_alpha.sh, with one alpha of two steps."""
    model = make_tiny_model(tmp_path / "model", "llama", max_position_embeddings=512)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"question": "one and one", "answer": "2"}\n{"question": "two and two", "answer": "4"}\n')
    environment = os.environ | {
        "VENV": str(this_environment(tmp_path / "venv", "plot,eval,example")),
        "ALPHAS": "2",
        "MODEL": str(model),
        "HELD_OUT": str(held_out),
        "RESPONSES": "2",
        "OUT": str(tmp_path / "out"),
    }
    settings = ["run.num_steps=2", "rollout.max_response_tokens=8", "parallel.micro_batch_size=16"]
    command = ["bash", "examples/sweep_alpha.sh", *settings]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"alpha_2", "base", "report"}
    assert (tmp_path / "out" / "report" / "index.html").is_file()
    shutil.rmtree(tmp_path / "out")


def test_what_is_shown_can_be_typed():
    """No command of a page has a word that a shell would read otherwise."""
    for command in COMMANDS:
        assert shlex.split(command.text) == list(command.words)
