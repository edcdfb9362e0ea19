"""`powerflow evaluate`: the same responses and numbers under every layout, and after every interruption."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import pytest

from megatron_powerflow.config_file import dump_config
from megatron_powerflow.console import make_console
from tests.conftest import REPOSITORY, run_cli
from tests.distributed.megatron_sessions import config_for, run_training
from tests.gloo_workers import RankFailed

SETTINGS = (
    "rollout.max_prompt_tokens=8",
    "rollout.max_response_tokens=6",
    "rollout.max_concurrent_rows=64",
    "precision.dtype=fp32",
)


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory) -> Path:
    """A random llama whose words are boxes: w3 ... spelt \\boxed{3}, five values, each spelt in many ways."""
    folder = tmp_path_factory.mktemp("boxing") / "model"
    shutil.copytree(tiny_model("llama", scale=0.1), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        word if i < 3 or i % 4 == 0 else f"\\boxed{{{'0' * (i // 5 % 30)}{i % 5}{'.0' * (i >= 150)}}}": i
        for word, i in words.items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    rows = [
        {"prompt_token_ids": [5 + i], "answer": i % 5, "id": f"q{i}", "task": "odd" if i % 2 else "even"}
        for i in range(37)
    ]
    rows.append({"prompt_token_ids": [7, 8], "id": "free", "task": "poem"})
    rows.append({"prompt_token_ids": [7] * 9, "id": "long", "task": "poem"})
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate_to(folder: str, data: str, out: str, overrides: tuple = (), num_responses: int = 8, **options) -> str:
    from megatron_powerflow.commands.open_model import GENERATE_KEYS, open_model
    from megatron_powerflow.evaluation.evaluate import EvaluationRequest, evaluate
    from megatron_powerflow.parallel.launch import read_launch

    launch = read_launch()
    console = make_console(io.StringIO(), width=200)
    settings, reference = options.pop("settings", SETTINGS), options.pop("reference", False)
    opened = open_model(Path(folder), (*settings, *overrides), GENERATE_KEYS, launch.world_size, reference=reference)
    request = EvaluationRequest(data=(data,), num_responses=num_responses, **options)
    evaluate(opened, request, Path(out), launch, console, command="powerflow evaluate")
    return console.file.getvalue()


def rows_of(results: dict) -> list[dict]:
    return [*results["tasks"].values(), results["all"]]


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


def results_of(out: Path) -> dict:
    return json.loads((out / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def alone(gloo, model, questions, tmp_path_factory) -> Path:
    """The evaluation of one process, unbroken."""
    out = tmp_path_factory.mktemp("alone") / "out"
    (shown,) = gloo.run(1, evaluate_to, str(model), str(questions), str(out))
    assert "1 questions over rollout.max_prompt_tokens dropped" in shown
    assert "avg@8" in shown
    return out


def test_lines_and_json_say_what_was_drawn(alone):
    lines, results = lines_of(alone), results_of(alone)
    assert [(line["id"], line["response_index"]) for line in lines] == [
        (name, r) for name in [*(f"q{i}" for i in range(37)), "free"] for r in range(8)
    ]
    assert all(line["sequence_log_prob"] < 0 and 1 <= line["num_response_tokens"] <= 6 for line in lines)
    graded = [line for line in lines if line["gold"] is not None]
    for line in graded:
        assert line["correct"] == (line["answer"] is not None and float(line["answer"]) == float(line["gold"]))
    assert results["all"]["num_questions"] == 38
    assert results["all"]["num_responses"] == 38 * 8
    assert results["all"]["avg"] == pytest.approx(sum(line["correct"] for line in graded) / len(graded))
    assert 0.05 < results["all"]["avg"] < 0.5 < results["all"]["boxed_rate"]
    assert results["all"]["avg"] < results["all"]["pass_at"]["8"]
    assert list(results["tasks"]) == ["even", "odd", "poem"]
    assert results["tasks"]["poem"]["avg"] is None
    assert (results["num_responses"], results["temperature"], results["seed"]) == (8, 1.0, 0)
    num_tokens = sum(line["num_response_tokens"] for line in lines)
    nats = -sum(line["sequence_log_prob"] for line in lines)
    assert results["all"]["policy_entropy"] == pytest.approx(nats / num_tokens)


@pytest.mark.parametrize(
    ("num_ranks", "overrides"),
    [(2, ()), (2, ("parallel.tp=2",)), (4, ("parallel.tp=2", "parallel.pp=2"))],
    ids=["dp2", "tp2", "tp2_pp2"],
)
def test_every_layout_gives_the_same_responses_and_the_same_json(
    gloo, alone, model, questions, tmp_path, num_ranks, overrides
):
    gloo.run(num_ranks, evaluate_to, str(model), str(questions), str(tmp_path / "out"), overrides)
    for ours, theirs in zip(lines_of(tmp_path / "out"), lines_of(alone), strict=True):
        assert ours.pop("sequence_log_prob") == pytest.approx(theirs.pop("sequence_log_prob"), abs=1e-3)
        assert ours == theirs
    ours, theirs = results_of(tmp_path / "out"), results_of(alone)
    for found, expected in zip(rows_of(ours), rows_of(theirs), strict=True):
        assert found.pop("policy_entropy") == pytest.approx(expected.pop("policy_entropy"), rel=1e-5)
    assert ours == theirs


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_an_evaluation_cut_anywhere_continues_to_the_same_bytes(gloo, alone, model, questions, tmp_path, num_ranks):
    """One process has rounds of 8 questions, two have rounds of 16: the file is cut in, behind and at their ends."""
    unbroken = alone
    if num_ranks == 2:
        unbroken = tmp_path / "unbroken"
        gloo.run(2, evaluate_to, str(model), str(questions), str(unbroken))
    whole = (unbroken / "responses.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size, num_done in ((ends[8 * 20] + 11, 16), (ends[8 * 16 - 1], 16), (30, 0), (len(whole) - 5, 32)):
        out = tmp_path / f"cut_{size}"
        out.mkdir()
        shutil.copy(unbroken / "settings.json", out)
        (out / "responses.jsonl").write_bytes(whole[:size])
        shown = gloo.run(num_ranks, evaluate_to, str(model), str(questions), str(out))[0]
        assert (f"continuing after {num_done} of 38 questions" in shown) == (num_done > 0)
        assert (out / "responses.jsonl").read_bytes() == whole
        assert results_of(out) == results_of(unbroken)


def test_a_finished_evaluation_is_counted_again_without_the_weights(gloo, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    data, out = tmp_path / "two.jsonl", tmp_path / "out"
    data.write_text('{"prompt_token_ids": [5], "answer": 1}\n{"prompt_token_ids": [6], "answer": 2}\n')
    arguments = (str(tmp_path / "model"), str(data), str(out))
    gloo.run(1, evaluate_to, *arguments)
    before, results = (out / "responses.jsonl").read_bytes(), results_of(out)
    (out / "evaluation.json").unlink()
    (tmp_path / "model" / "model.safetensors").unlink()
    (shown,) = gloo.run(1, evaluate_to, *arguments, diversity=True)
    assert (out / "responses.jsonl").read_bytes() == before
    again = results_of(out)
    assert 0 < again["diversity"]["self_bleu"] < 1
    assert again | {"diversity": {}} == results
    assert "embedding_distance" in shown


def refused(*arguments, **options) -> tuple[str, ...]:
    """The violations, as an answer: a rank that fails would be started anew."""
    from megatron_powerflow.errors import UserError

    try:
        evaluate_to(*arguments, **options)
    except UserError as error:
        return error.violations
    return ()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_other_settings_and_foreign_lines_are_refused_on_every_rank(gloo, alone, model, questions, tmp_path, num_ranks):
    out = tmp_path / "out"
    shutil.copytree(alone, out)
    arguments = (str(model), str(questions), str(out))
    for found in gloo.run(num_ranks, refused, *arguments, ("run.seed=1",)):
        assert found[0] == f"{out}: seed was 0 there and is 1 now"
    (out / "responses.jsonl").write_text("{}\n")
    for found in gloo.run(num_ranks, refused, *arguments):
        assert found == (f"{out / 'responses.jsonl'}:1: not the response that belongs here; remove {out}",)
    for found in gloo.run(num_ranks, refused, *arguments, greedy=True):
        assert "--greedy with --num-responses 8" in found[0]


def test_a_model_without_a_template_is_asked_in_the_plain_form_which_is_said(gloo, model, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"question": "w4 w8", "answer": "1"}\n')
    room = ("rollout.max_prompt_tokens=16",)
    (shown,) = gloo.run(1, evaluate_to, str(model), str(data), str(tmp_path / "plain"), room)
    assert "notice: the model has no chat template: conversations are written as Question: ... Answer:" in shown
    gloo.run(1, evaluate_to, str(model), str(data), str(tmp_path / "out"), prompt_as="text", suffix="w8")
    for out in ("plain", "out"):
        assert [line["task"] for line in lines_of(tmp_path / out)] == ["mine"] * 8
    assert lines_of(tmp_path / "plain")[0]["text"] != lines_of(tmp_path / "out")[0]["text"]


def test_greedy_asks_once_and_a_checkpoint_is_a_model(gloo, model, questions, tmp_path):
    """The untrained checkpoint (lr 0) answers as the folder it started from."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{hf_path: {model}}}
prompts: {{path: {tmp_path / "prompts.jsonl"}}}
precision: {{dtype: fp32}}
rollout: {{prompts_per_step: 2, responses_per_prompt: 2, max_prompt_tokens: 8, max_response_tokens: 6}}
optimizer: {{lr: 0.0}}
metrics: {{wandb: "off", curves: false}}
evaluation: {{samples: 0}}
run: {{num_steps: 1, output_dir: {tmp_path / "run"}}}
"""
    )
    gloo.run(1, run_training, config)
    for name, folder in (("folder", model), ("checkpoint", tmp_path / "run")):
        out = str(tmp_path / name)
        gloo.run(1, evaluate_to, str(folder), str(questions), out, num_responses=1, greedy=True)
    assert (tmp_path / "folder" / "responses.jsonl").read_text() == (
        tmp_path / "checkpoint" / "responses.jsonl"
    ).read_text()
    results = results_of(tmp_path / "checkpoint")
    assert results["temperature"] == 0.0
    assert results["model"].endswith("step_000001")


def test_a_run_is_evaluated_under_its_own_limits_and_beside_its_base(gloo, model, questions, tmp_path):
    """No limit is given: those of the run hold. The base is what the run started from, not what it became."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt_token_ids": [8, 9]}\n')
    rollout = {"prompts_per_step": 2, "responses_per_prompt": 2, "max_prompt_tokens": 16, "max_response_tokens": 4}
    config = config_for(model, tmp_path / "prompts.jsonl", tmp_path / "run", "run.num_steps=2", "optimizer.lr=0.05")
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})
    (tmp_path / "config.yaml").write_text(dump_config(config))
    gloo.run(1, run_training, tmp_path / "config.yaml")
    run, same = str(tmp_path / "run"), ("rollout.max_prompt_tokens=16", "rollout.max_response_tokens=4")
    gloo.run(1, evaluate_to, run, str(questions), str(tmp_path / "policy"), settings=())
    gloo.run(1, evaluate_to, run, str(questions), str(tmp_path / "base"), settings=(), reference=True)
    gloo.run(1, evaluate_to, str(model), str(questions), str(tmp_path / "folder"), settings=same)
    assert max(line["num_response_tokens"] for line in lines_of(tmp_path / "policy")) == 4
    assert lines_of(tmp_path / "base") == lines_of(tmp_path / "folder")
    assert lines_of(tmp_path / "base") != lines_of(tmp_path / "policy")
    with pytest.raises(RankFailed, match="this is no run's folder"):
        gloo.run(1, evaluate_to, str(model), str(questions), str(tmp_path / "none"), reference=True)


def test_the_command_says_what_is_wrong_and_exits_with_2(model, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"question": "w4"}\n{"question": "w8", "answer": ""}\n')
    done = run_cli(
        "evaluate", "--model", model, "--data", data, "--format", "math", "--out", tmp_path / "out", *SETTINGS
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2:] == [
        f"error: {data}:1: answer must be a text or a number, got None",
        f"error: {data}:2: answer is empty",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_the_command_killed_in_the_middle_and_given_again_leaves_the_same_file(model, tmp_path):
    """A real SIGKILL of the real command; a process start is ten seconds."""
    import subprocess
    import sys

    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps({"prompt_token_ids": [5 + i], "answer": i % 5}) + "\n" for i in range(12)))
    arguments = ["evaluate", "--model", model, "--data", data, "--num-responses", 64]  # a round is one question
    arguments += ["rollout.max_response_tokens=100", "rollout.max_prompt_tokens=8", *SETTINGS[2:]]
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert run_cli(*arguments, "--out", unbroken).returncode == 0
    command = [sys.executable, "-m", "megatron_powerflow.cli", *map(str, arguments), "--out", str(killed)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    path = killed / "responses.jsonl"
    while process.poll() is None and (not path.exists() or path.stat().st_size == 0):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < path.stat().st_size < (unbroken / "responses.jsonl").stat().st_size
    done = run_cli(*arguments, "--out", killed)
    assert done.returncode == 0
    assert "continuing after" in done.stdout
    assert path.read_bytes() == (unbroken / "responses.jsonl").read_bytes()
    ours, theirs = results_of(killed), results_of(unbroken)
    assert ours.pop("command") == theirs.pop("command").replace("unbroken", "killed")
    assert ours == theirs
