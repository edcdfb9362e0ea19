"""Two starts in one folder, exports onto folders that are not to be replaced, starts that are refused: nothing is lost,
nothing is left behind. Real processes of the command line, killed for real."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, run_cli
from tests.distributed.megatron_sessions import run_training
from tests.unit.test_targets import listing


@pytest.fixture
def config(tiny_model, tmp_path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    path = tmp_path / "config.yaml"
    path.write_text(
        f"""
model: {{hf_path: {tiny_model("llama")}}}
precision: {{dtype: fp32}}
prompts: {{path: {tmp_path / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
parallel: {{micro_batch_size: 2}}
optimizer: {{lr: 1e-3}}
checkpoint: {{interval: 1}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 1, output_dir: {tmp_path / "run"}}}
"""
    )
    return path


def started(config: Path, run: Path) -> subprocess.Popen:
    """A run that goes on, after its first step."""
    command = [sys.executable, "-m", "megatron_powerflow.cli", "train", str(config)]
    command += ["run.num_steps=100000", "checkpoint.keep=2"]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / "latest").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def num_steps(run: Path) -> int:
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step_"))


@pytest.mark.slow
def test_two_starts_in_one_folder(config, tmp_path):
    """The second is refused and says whose it is; the first goes on, and can be asked to stop."""
    run = tmp_path / "run"
    first = started(config, run)
    try:
        held = f"error: {run}: is held by powerflow train (process {first.pid} on {socket.gethostname()}) since 20"
        settled = {name: (run / name).read_bytes() for name in ("config.yaml", "launches.jsonl", "run.lock")}
        for command in ("train", "check"):
            second = run_cli(command, config, "run.num_steps=7")
            assert second.returncode == 2, second.stderr
            assert held in second.stderr
            assert "wait for it to end, stop it, or write elsewhere" in second.stderr
            assert "Traceback" not in second.stderr
        assert settled == {name: (run / name).read_bytes() for name in settled}
        assert first.poll() is None
        assert run_cli("stop", config).returncode == 0
        _, said = first.communicate(timeout=300)
        assert (first.returncode, "the same command continues" in said) == (75, True)
        assert not [*run.glob("run.lock*")]
        lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert lines == list(range(num_steps(run)))
    finally:
        first.kill()
        first.wait()


@pytest.mark.long
def test_after_a_kill_the_same_command_continues_on_its_own_host(config, tmp_path):
    """There it is seen at once that the owner is gone; another host waits until the lock is old."""
    run = tmp_path / "run"
    killed = started(config, run)
    os.killpg(killed.pid, 9)
    killed.wait()
    killed.stderr.close()
    lock = run / "run.lock"
    values = json.loads(lock.read_text())
    assert values["pid"] == killed.pid
    lock.write_text(json.dumps(values | {"host": "node17"}))  # its owner seems to be on another host
    before = listing(run)
    goal = f"run.num_steps={num_steps(run) + 1}"
    refused = run_cli("train", config, goal)
    assert refused.returncode == 2
    assert f"(process {killed.pid} on node17) since" in refused.stderr
    assert "If it was killed, start again when its lock run.lock has not been touched for 300 s" in refused.stderr
    assert listing(run) == before
    lock.write_text(json.dumps(values))  # and is on this one after all
    done = run_cli("train", config, goal)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout
    assert not [*run.glob("run.lock*")]


def test_ranks_refuse_together(gloo, config, tmp_path):
    """Only the main rank looks at the lock; the others do not go on, nor wait for it."""
    from tests.gloo_workers import RankFailed

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_text("")
    with pytest.raises(RankFailed) as caught:
        gloo.run(2, run_training, config, "parallel.pp=2")
    assert caught.value.kind == "UserError"
    assert "is held by a process" in caught.value.violations[0]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_a_start_that_is_refused_while_the_model_is_read_leaves_nothing(gloo, config, tiny_model, tmp_path):
    """A damaged converted model is found only then; the mended command, with other settings too, just runs."""
    from megatron_powerflow.converter.convert import ConversionRequest, hf_to_megatron
    from megatron_powerflow.converter.ranks import Ranks
    from tests.gloo_workers import RankFailed

    model = tmp_path / "converted"
    hf_to_megatron(ConversionRequest(tiny_model("llama"), model), Ranks())
    (shard,) = (model / "release").glob("*.distcp")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RankFailed) as caught:
        gloo.run(1, run_training, config, f"model.hf_path={model}")
    assert caught.value.kind == "UserError"
    assert not (tmp_path / "run").exists()
    shard.write_bytes(whole)
    gloo.run(1, run_training, config, f"model.hf_path={model}", "optimizer.lr=1e-4")
    assert num_steps(tmp_path / "run") == 1


def test_a_start_that_was_killed_before_its_first_step_gives_way_to_other_settings(gloo, config, tmp_path):
    """What it had written is gone; a run with a step keeps its folder."""
    from tests.gloo_workers import RankFailed

    run = tmp_path / "run"
    gloo.run(1, run_training, config, "run.export=false")
    with pytest.raises(RankFailed, match=r"another run: its optimizer\.eps"):
        gloo.run(1, run_training, config, "optimizer.eps=1e-4")
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").write_text("")
    (run / "samples.jsonl").write_text("of the try before\n")
    (run / ".config.yaml.x1_2ab3c.partial").write_text("half a")
    gloo.run(1, run_training, config, "optimizer.eps=1e-4", "run.export=false")
    assert "eps: 0.0001" in (run / "config.yaml").read_text()
    assert len((run / "launches.jsonl").read_text().splitlines()) == 1
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "events.jsonl",
        "inputs.json",
        "launches.jsonl",
        "metrics.jsonl",
    ]


@pytest.mark.slow
def test_a_config_of_the_users_is_not_taken_for_a_run(config, tmp_path):
    """run.output_dir names the folder that the config file itself lies in."""
    (tmp_path / "prompts.jsonl").rename(tmp_path.parent / "prompts.jsonl")
    before = listing(tmp_path)
    for command in ("check", "train"):
        done = run_cli(command, config, f"run.output_dir={tmp_path}", f"prompts.path={tmp_path.parent}/prompts.jsonl")
        assert done.returncode == 2
        assert "holds other files and no run (config.yaml)" in done.stderr
    assert listing(tmp_path) == before


def refused_exports(run: str, outs: list[str], work: str) -> list[str]:
    """What `powerflow export` says of each target, with nothing of torch's processes or of the model touched."""
    import io

    from megatron_powerflow.commands import export
    from megatron_powerflow.commands.open_model import COMMON_KEYS, open_model
    from megatron_powerflow.console import make_console
    from megatron_powerflow.errors import UserError
    from megatron_powerflow.parallel.launch import read_launch

    def too_late(*_, **__):
        raise AssertionError("judged too late")

    before, here, said = (export.initialized, export.load_chunks), os.getcwd(), []
    export.initialized = export.load_chunks = too_late
    os.chdir(work)
    try:
        for out in outs:
            try:
                opened = open_model(Path(run), (), COMMON_KEYS, 1)
                export.export_file(opened, Path(out), read_launch(), make_console(io.StringIO()))
                said.append("")
            except UserError as error:
                said.append(str(error))
    finally:
        export.initialized, export.load_chunks = before
        os.chdir(here)
    return said


@pytest.mark.slow
def test_an_export_onto_anything_but_an_export_is_refused_before_any_work(gloo, config, tiny_model, tmp_path):
    run, source = tmp_path / "runs" / "a", tmp_path / "models" / "base"
    shutil.copytree(tiny_model("llama"), source)
    shutil.copytree(source, tmp_path / "models" / "other")
    gloo.run(1, run_training, config, f"run.output_dir={run}", f"model.hf_path={source}")
    shutil.copytree(run, tmp_path / "runs" / "b")
    for name, file in (("notes", "thesis.tex"), ("work", "draft.tex")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(run / "hf_export")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "thesis.tex").write_text("precious")
    outs = {
        "the run's own folder": (run, "lies in the other"),
        "its parent": (run.parent, "lies in the other"),
        "its checkpoints": (run / "checkpoints", "lies in the other"),
        "its checkpoint": (run / "checkpoints" / "step_000001", "lies in the other"),
        "in its checkpoint": (run / "checkpoints" / "step_000001" / "out", "lies in the other"),
        "another run": (tmp_path / "runs" / "b", "no powerflow export wrote it"),
        "another run's checkpoint": (tmp_path / "runs" / "b" / "checkpoints" / "step_000001", "no powerflow export"),
        "the source model": (source, "lies in the other"),
        "another model": (tmp_path / "models" / "other", "no powerflow export wrote it"),
        "a folder of several models": (source.parent, "lies in the other"),
        "a folder of notes": (tmp_path / "notes", "no powerflow export wrote it (it holds thesis.tex)"),
        "a file": (tmp_path / "file", "it is no folder"),
        "a link to an export": (tmp_path / "link", "a link to"),
        "the current folder": (Path("."), "is not to be replaced"),
        "home": (Path.home(), "is not to be replaced"),
        "beside another's .partial": (tmp_path / "new", "new.partial is in the way"),
    }
    before = listing(tmp_path)
    arguments = (str(run), [str(path) for path, _ in outs.values()], str(tmp_path / "work"))
    (said,) = gloo.run(1, refused_exports, *arguments)
    for (name, (path, words)), text in zip(outs.items(), said, strict=True):
        assert f"--out {path}: " in text, name
        assert words in text, (name, text)
    done = run_cli("export", run, "--out", run.parent)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert listing(tmp_path) == before
    done = run_cli("export", run, "--out", run / "hf_export")
    assert done.returncode == 0, done.stderr
    mark = json.loads((run / "hf_export" / "conversion.json").read_text())
    assert mark["made_by"] == "powerflow export"
    assert sorted(mark["files"]) == sorted(listing(run / "hf_export"))


@pytest.mark.slow
def test_a_run_that_could_not_export_at_its_end_is_refused_at_its_start(config, tmp_path):
    """Somebody keeps notes in its hf_export."""
    run = tmp_path / "run"
    (run / "hf_export").mkdir(parents=True)
    (run / "hf_export" / "notes.txt").write_text("precious")
    before = listing(run)
    for command in ("check", "train"):
        done = run_cli(command, config)
        assert done.returncode == 2
        assert "run.export=true:" in done.stderr
        assert "no powerflow export wrote it (it holds notes.txt)" in done.stderr
    assert listing(run) == before


def evaluate_refused(model: str, data: str, out: str) -> str:
    import io

    from megatron_powerflow.commands.open_model import GENERATE_KEYS, open_model
    from megatron_powerflow.console import make_console
    from megatron_powerflow.errors import UserError
    from megatron_powerflow.evaluation.evaluate import EvaluationRequest, evaluate
    from megatron_powerflow.parallel.launch import read_launch

    settings = ("rollout.max_prompt_tokens=8", "rollout.max_response_tokens=6")
    opened = open_model(Path(model), settings, GENERATE_KEYS, 1)
    try:
        evaluate(
            opened, EvaluationRequest((data,), num_responses=1), Path(out), read_launch(), make_console(io.StringIO())
        )
    except UserError as error:
        return str(error)
    return ""


def test_one_evaluation_at_a_time_fills_a_folder(gloo, config, tiny_model, tmp_path):
    out, model, data = tmp_path / "evaluation", str(tiny_model("llama")), str(tmp_path / "prompts.jsonl")
    out.mkdir()
    (out / "evaluation.lock").write_text("")
    (said,) = gloo.run(1, evaluate_refused, model, data, str(out))
    assert f"{out}: is held by a process" in said
    assert [path.name for path in out.iterdir()] == ["evaluation.lock"]
    (out / "evaluation.lock").unlink()
    damaged = shutil.copytree(model, tmp_path / "damaged")
    (damaged / "model.safetensors").unlink()
    (said,) = gloo.run(1, evaluate_refused, str(damaged), data, str(out))
    assert "model.safetensors" in said
    assert not [*out.iterdir()]  # the mended command, with other settings too, is no other evaluation
    assert gloo.run(1, evaluate_refused, model, data, str(out)) == [""]
    names = sorted(path.name for path in out.iterdir())
    assert names == ["evaluation.json", "responses.jsonl", "settings.json"]


def written_while_written(model: str, out: Path) -> list[str]:
    """What a second command is told that would write the same file of lines, before and while the first one does."""
    import io

    from megatron_powerflow.commands.open_model import SCORE_KEYS, open_model
    from megatron_powerflow.commands.rounds import SCORED, output_refusals, write_rounds
    from megatron_powerflow.console import make_console
    from megatron_powerflow.errors import UserError
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch

    opened, said = open_model(Path(model), (), SCORE_KEYS, 1), []
    with initialized(opened.layout, read_launch(), seed=0) as groups:

        def write(items, one_round):
            write_rounds(items, one_round, 1, out, groups, make_console(io.StringIO()), "powerflow score")

        def one_round(items):
            said.extend(output_refusals(out, SCORED))
            try:
                write([7], lambda others: [(0, {"id": 7})])
            except UserError as error:
                said.append(str(error))
            return [(item, {"id": item}) for item in items]

        write([0, 1], one_round)
    return said


def test_one_command_at_a_time_writes_a_file_of_lines(gloo, tiny_model, tmp_path):
    out = tmp_path / "lines.jsonl"
    (said,) = gloo.run(1, written_while_written, str(tiny_model("llama")), out)
    assert len(said) == 4
    assert all(f"{out}: is held by powerflow score (process " in text for text in said)
    assert out.read_text() == '{"id": 0}\n{"id": 1}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]


@pytest.mark.long
def test_one_export_at_a_time_writes_a_folder_and_readers_need_no_lock(gloo, config, tmp_path):
    """A run that is held is read all the same: exported elsewhere, and scored."""
    from tests.distributed.test_export import score_to

    run = tmp_path / "run"
    gloo.run(1, run_training, config)
    (run / "run.lock").write_text("")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt_token_ids": [5, 6], "response_token_ids": [7, 8, 2]}\n')
    gloo.run(1, score_to, str(run), str(rows), str(tmp_path / "scored.jsonl"), ())
    (tmp_path / "out.lock").write_text("")
    refused = run_cli("export", run, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert f"{tmp_path / 'out'}: is held by a process" in refused.stderr
    assert not [*tmp_path.glob("out.partial")]
    (tmp_path / "out.lock").unlink()
    done = run_cli("export", run, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    before = rows.read_text()
    done = run_cli("score", "--model", run, "--data", rows, "--out", rows)
    assert (done.returncode, rows.read_text()) == (2, before)
    assert "this command did not write it" in done.stderr


def test_going_back_to_an_earlier_checkpoint_loses_neither_it_nor_the_newest(gloo, config, tmp_path):
    """checkpoint.keep counts up to the step just saved: later ones, of another course, are not what is kept instead."""
    gloo.run(1, run_training, config, "run.num_steps=4", "run.export=false")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "latest").write_text("step_000001\n")
    gloo.run(1, run_training, config, "run.num_steps=2", "run.export=false", "checkpoint.keep=1")
    assert (checkpoints / "latest").read_text() == "step_000002\n"
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step_000002",
        "step_000003",
        "step_000004",
    ]
