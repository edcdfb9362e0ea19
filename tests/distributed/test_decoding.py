"""`powerflow generate --decoding ...`: options that would do nothing, and verbalized sampling from end to end.

The verbalizing model is a random one whose every word is an answer: one token, one JSON object.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_powerflow.cli import app
from megatron_powerflow.errors import UserError
from tests.tiny_models import make_tiny_model

CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["generate", "--model", "m", "--prompts", "p", "--out", "o", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--alpha", "4"], "--alpha has no effect with --decoding sample"),
        (["--decoding", "verbalized", "--moves", "3"], "--moves has no effect with --decoding verbalized"),
        (["--decoding", "power_sampling", "--target-words", "9"], "--target-words has no effect"),
        (["--decoding", "power_sampling", "--greedy"], "--greedy has no effect with --decoding power_sampling"),
        (["--decoding", "power_sampling", "--alpha", "0"], "a power is a number above 0"),
        (["--decoding", "power_sampling", "--alpha", "nan"], "a power is a number above 0"),
    ],
)
def test_options_that_would_do_nothing_are_refused(arguments, message):
    assert message in refused(*arguments)


def test_settings_that_would_do_nothing_are_refused(gloo, tiny_model, tmp_path):
    model, prompts = str(tiny_model("llama")), tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [5]}\n')

    def refusal(*arguments: str) -> str:  # in a process of its own: it imports Megatron
        return gloo.run(1, refused, "--model", model, "--prompts", str(prompts), *arguments)[0]

    sizes = ["rollout.max_prompt_tokens=8", "rollout.max_response_tokens=4"]
    power = ["--decoding", "power_sampling", *sizes]
    assert "rollout.temperature has no effect here" in refusal(*power, "rollout.temperature=0.5")
    assert "16 blocks of 4 response tokens" in refusal(*power)
    assert "parallel.micro_batch_size has no effect here" in refusal("parallel.micro_batch_size=2")
    verbalized = ["--decoding", "verbalized", *sizes]
    assert "prompt_token_ids are no conversation" in refusal(*verbalized)
    prompts.write_text('{"prompt": "w5"}\n')
    assert "over rollout.max_prompt_tokens=8" in refusal(*verbalized)


def verbalize(model: str, prompts: str, out: str, num_responses: int, overrides: tuple) -> str:
    """What `powerflow generate --decoding verbalized` does, on this rank; returns what it printed."""
    from megatron_powerflow.commands.open_model import GENERATE_KEYS, open_model
    from megatron_powerflow.commands.verbalized import VerbalizedSampling, verbalize_file
    from megatron_powerflow.console import make_console
    from megatron_powerflow.parallel.launch import read_launch

    launch = read_launch()
    opened = open_model(Path(model), overrides, GENERATE_KEYS, launch.world_size)
    recipe = VerbalizedSampling(num_responses, target_words=None, temperature=opened.config.rollout.temperature)
    console = make_console(io.StringIO(), width=200)
    verbalize_file(opened, Path(prompts), Path(out), recipe, launch, console)
    return console.file.getvalue()


def make_verbalizing_model(folder: Path, vocab_size: int) -> Path:
    """Even words are answers of two responses, odd ones are cut short."""
    model = make_tiny_model(folder, "llama", vocab_size=vocab_size)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = ["<unk>", "<s>", "</s>"]
    for i in range(3, vocab_size):
        responses = [{"text": f"story{i}", "probability": 0.5}, {"text": f"tale{i}", "probability": 0.125}]
        answer = json.dumps({"responses": responses}, separators=(",", ":"))
        words.append(answer if i % 2 == 0 else answer[:-1])
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHAT_TEMPLATE}))
    return model


def test_verbalized_responses_are_written_and_the_others_counted(gloo, tmp_path):
    model = make_verbalizing_model(tmp_path / "model", vocab_size=120)
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"write {i}", "id": f"p{i}"}) + "\n" for i in range(24)))
    settings = ("rollout.max_prompt_tokens=200", "rollout.max_response_tokens=1")
    (printed,) = gloo.run(1, verbalize, str(model), str(prompts), str(answers), 3, settings)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    ids = list(dict.fromkeys(line["id"] for line in lines))
    assert 0 < len(ids) < 24  # some answers are JSON, some are not
    assert ids == sorted(ids, key=lambda name: int(name[1:]))
    assert len(lines) == 2 * len(ids)
    for first, second in zip(lines[::2], lines[1::2], strict=True):
        number = int(first["text"].removeprefix("story"))
        assert number % 2 == 0
        assert first == {"id": first["id"], "response_index": 0, "text": f"story{number}", "probability": 0.5}
        assert second == {"id": first["id"], "response_index": 1, "text": f"tale{number}", "probability": 0.125}
    assert f"of 72 responses asked for, {3 * (24 - len(ids))} not written: no JSON object" in printed
    assert f"of 72 responses asked for, {len(ids)} not written: fewer responses than asked for" in printed

    over_dp = tmp_path / "dp2.jsonl"
    printed_dp, _ = gloo.run(2, verbalize, str(model), str(prompts), str(over_dp), 3, settings)
    assert over_dp.read_text() == answers.read_text()
    assert printed_dp.replace(str(over_dp), str(answers)) == printed


def command_line(*arguments: str) -> str:
    """`powerflow generate ...` on this rank; returns what it printed."""
    result = CliRunner().invoke(app, ["generate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_reaches_every_decoding(gloo, tmp_path):
    model = make_verbalizing_model(tmp_path / "model", vocab_size=60)
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    arguments = ["--model", str(model), "--prompts", str(prompts), "--out", str(out), "--num-responses", "2"]
    sizes = ["rollout.max_prompt_tokens=200", "rollout.max_response_tokens=5"]

    def lines(*options: str) -> list[dict]:
        printed = gloo.run(1, command_line, *arguments, *options, *sizes)[0]
        assert "wrote" in printed
        return [json.loads(line) for line in out.read_text().splitlines()]

    power = lines("--decoding", "power_sampling", "--alpha", "0.5", "--blocks", "2", "--moves", "3")
    assert [(line["id"], line["response_index"]) for line in power] == [("0", 0), ("0", 1), ("1", 0), ("1", 1)]
    assert {line["num_moves"] for line in power} == {6}
    assert any(line["num_accepted"] for line in power)
    plain = lines()
    assert "num_moves" not in plain[0]
    sharp = lines("--decoding", "power_sampling", "--alpha", "1e4", "--blocks", "1", "--moves", "0")
    greedy = lines("--greedy")
    assert [line["response_token_ids"] for line in sharp] == [line["response_token_ids"] for line in greedy]
    asked_at_length = ["--decoding", "verbalized", "--greedy", "--target-words", "9"]
    assert all(line.keys() == {"id", "response_index", "text", "probability"} for line in lines(*asked_at_length))
