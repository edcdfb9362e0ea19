"""Files as they come: whatever is in them, the program ends with its own error or works; nothing else escapes.

Each kind of file starts from a good one; a value in it is replaced, a part of it cut, doubled or overwritten. 300 cases
with the other tests, 10,000 with -m long.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_powerflow.checkpoint.choice import is_sound
from megatron_powerflow.checkpoint.digests import digest_of, write_sums
from megatron_powerflow.checkpoint.state import Proof, RunProgress, progress_text
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.data.prompts import load_prompts
from megatron_powerflow.data.tokenizer import load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.evaluation.questions import load_questions
from megatron_powerflow.hf.checked import open_checked
from megatron_powerflow.hf.config import read_architecture, read_stop_token_ids
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.journal import append_lines
from megatron_powerflow.metrics.alarm import raised_alarms
from megatron_powerflow.metrics.alarm_words import thresholds_of
from megatron_powerflow.metrics.step_log import StepLog
from megatron_powerflow.metrics.writers import read_metrics
from megatron_powerflow.model_card import card_files
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.report.goodput_table import goodput_json, goodput_table, read_all
from megatron_powerflow.report.runs import read_runs
from megatron_powerflow.rollout.rollout_files import find_rollouts, read_rollouts, step_file, write_rollouts
from megatron_powerflow.training.inputs import read_inputs
from megatron_powerflow.training.resume import find_resume

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e308, 10**30, 2**63, float("nan"), float("inf"), "", " ", "x", "0"),
    *("nan", "\x00", "\ud800", "../../etc/passwd", "{{ 1/0 }}", "{% for i in range(9) %}x{% endfor %}", "é" * 300),
    *([], [None], [[]], {}, {"": 0}, {"a": {"b": []}}, [1, "2", 3.0], ["</s>"], "9" * 5000, [0] * 50),
)


CLOCK = {"start": "a", "time": 1.7e9, "uptime": 9.0}
EVENTS = (
    {"event": "start", **CLOCK, "began": 1.0, "untouched": None, "boot": "b", "world_size": 2, "device": "cpu"},
    {"event": "loaded", **CLOCK, "first_step": 0, "num_dropped": 0},
    {"event": "step", **CLOCK, "step": 0, "seconds": {"rollout": 1.0, "update": 2.0}},
    {"event": "saved", **CLOCK, "step": 1, "seconds": {"checkpoint": 1.0}},
    {"event": "end", **CLOCK, "cause": "bug", "by": "KeyError", "seconds": {}},
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where something can be replaced in a document, the document itself included."""
    found = [path]
    if isinstance(value, dict):
        found += [deeper for key in value for deeper in places(value[key], (*path, key))]
    elif isinstance(value, list):
        found += [deeper for place in range(min(len(value), 8)) for deeper in places(value[place], (*path, place))]
    return found


def with_value(value: Any, path: tuple, new: Any) -> Any:
    if not path:
        return new
    if isinstance(value, dict):
        return {key: with_value(item, path[1:], new) if key == path[0] else item for key, item in value.items()}
    return [with_value(item, path[1:], new) if place == path[0] else item for place, item in enumerate(value)]


def changed_bytes(content: bytes, r: random.Random) -> bytes:
    start = r.randrange(len(content) + 1)
    end = min(len(content), start + r.choice([1, 2, 8, 64, len(content)]))
    middle = r.choice(
        [b"", content[start:end] * 2, b"\x00", b"\xff\xfe", b"[" * 5000, b'"', b"\n", b"{}", bytes([r.randrange(256)])]
    )
    return content[:start] + middle + content[end:]


def changed(content: bytes, r: random.Random, *, document: str | None) -> bytes:
    """document: "json", "lines" or "yaml", whose values may be replaced; None: bytes only."""
    if document is None or r.random() < 0.4:
        return changed_bytes(content, r)
    text = content.decode()
    if document == "lines":
        lines = text.splitlines()
        place = r.randrange(len(lines))
        lines[place] = dumped(json.loads(lines[place]), r)
        return "\n".join(lines).encode("utf-8", errors="surrogatepass")
    value = yaml.safe_load(text) if document == "yaml" else json.loads(text)
    return dumped(value, r).encode("utf-8", errors="surrogatepass")


def dumped(value: Any, r: random.Random) -> str:
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        value = with_value(value, r.choice(places(value)), r.choice(VALUES))
    return json.dumps(value)


class World:
    """A good model, prompts, run folder and rollouts, and for each kind of file what reads it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.model = shutil.copytree(model, folder / "model")
        settings = json.loads((self.model / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}w9"
        (self.model / "tokenizer_config.json").write_text(json.dumps(settings))
        (folder / "prompts.jsonl").write_text(
            '{"prompt": "w5 w6", "answer": 4, "id": "a"}\n'
            '{"messages": [{"role": "user", "content": "w7"}], "task": "x", "answer": "\\\\frac12"}\n'
            '{"question": "w8?", "solution": "so \\\\boxed{3}", "reward_model": {"ground_truth": "3"}}\n'
        )
        (folder / "list.json").write_text('[{"problem": "p?", "answer": "1"}, {"problem": "q?", "answer": 2.5}]')
        (folder / "table.csv").write_text('id,question,answer\n1,What?,4\n2,"Why, though?",5\n')
        self.config = folder / "config.yaml"
        self.config.write_text(
            f"model: {{hf_path: {self.model}}}\nprompts: {{path: {folder / 'prompts.jsonl'}}}\n"
            "rollout: {prompts_per_step: 2, responses_per_prompt: 2, temperature: 1.0}\n"
            f"objective: {{alpha: 2.0, psi: -0.5}}\nrun: {{output_dir: {folder / 'run'}, num_steps: 3}}\n"
        )
        rollouts = [
            Rollout(Prompt("a", 0, (5, 6), answer="4"), 0, index, (9, 2), (-0.5, -1.0), "eos") for index in range(2)
        ]
        write_rollouts(step_file(folder / "saved", 0), rollouts, step=0, vocab_size=300, temperature=1.0)
        self._make_run(folder / "run")

    def _make_run(self, run: Path) -> None:
        from megatron_powerflow.checkpoint.first_files import CONFIG_MARK
        from megatron_powerflow.config_file import dump_config

        checkpoint = run / "checkpoints" / "step_000002"
        checkpoint.mkdir(parents=True)
        (run / "config.yaml").write_text(CONFIG_MARK + dump_config(load_config(self.config)))
        (run / "checkpoints" / "latest").write_text("step_000002\n")
        (run / "launches.jsonl").write_text('{"first_step": 0, "world_size": 1, "command": "x", "versions": {}}\n')
        (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0, "alarm": 0.0}\n{"step": 1, "loss": 0.5}\n')
        (run / "evaluations.jsonl").write_text('{"step": 0, "accuracy": 0.5, "pass_at": {"1": 0.5}}\n')
        (run / "samples.jsonl").write_text('{"step": 0, "id": "a", "question": "q", "response": "r", "answer": "4"}\n')
        append_lines(run / "events.jsonl", EVENTS)
        values = {"format": 1, "today": "2026-11-26", "paths": {}, "digests": {"prompts": "x"}, "replay": {}}
        (checkpoint / "inputs.json").write_text(json.dumps(values | {"versions": {"tokenizers": "0"}}))
        text = progress_text(RunProgress(2, 4, 0, 0, "x"), Proof("1" * 16, "", "2" * 16, 2, True))
        (checkpoint / "progress.json").write_text(text)
        write_sums(checkpoint, {path.name: digest_of(path) for path in checkpoint.iterdir()})

    def tokenized(self) -> None:
        tokenizer = load_tokenizer(self.model)
        ids = tokenizer.encode_chat([{"role": "user", "content": "w5"}]) + tokenizer.encode("w6 w7")
        tokenizer.decode(ids)
        read_stop_token_ids(self.model, tokenizer.eos_token_id, 300)

    def prompts(self, name: str) -> Callable[[], object]:
        tokenizer = load_tokenizer(self.model)
        options = {"vocab_size": 300, "max_prompt_tokens": 20, "too_long": "drop"}
        return lambda: load_prompts(self.folder / name, tokenizer, **options)

    def weights(self) -> None:
        open_checked(self.model, *read_architecture(self.model, FAMILIES))

    def report(self) -> None:
        """What `powerflow report` and `powerflow goodput` read of a run, and a start that goes on with it."""
        run, notes = self.folder / "run", []
        read_runs([run], notes)
        for goodput in read_all({run: False}, notes).values():
            json.dumps(goodput_json(goodput), allow_nan=False)
            make_console(io.StringIO()).print(goodput_table(run, goodput))
        raised_alarms(read_metrics(run, notes), thresholds_of(load_config(self.config)))
        for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
            content = (run / name).read_bytes()
            StepLog(run / name, first_step=1).append(1, [{"step": 1}])
            (run / name).write_bytes(content)
        card_files(run, 1, "powerflow export")

    def older(self) -> None:
        """The same of a run of before events.jsonl."""
        events = self.folder / "run" / "events.jsonl"
        content = events.read_bytes()
        events.unlink()
        try:
            self.report()
        finally:
            events.write_bytes(content)

    def kinds(self) -> dict[str, tuple[Path, str | None, Callable[[], object]]]:
        """Name -> (file, what it is as a document, what reads it)."""
        model, folder, run = self.model, self.folder, self.folder / "run"
        checkpoint, saved = run / "checkpoints" / "step_000002", step_file(folder / "saved", 0)
        config = load_config(self.config)
        return {
            "config.json": (model / "config.json", "json", self.weights),
            "generation_config.json": (model / "generation_config.json", "json", self.tokenized),
            "tokenizer_config.json": (model / "tokenizer_config.json", "json", self.tokenized),
            "tokenizer.json": (model / "tokenizer.json", "json", self.tokenized),
            "weights": (model / "model.safetensors", None, self.weights),
            "config.yaml": (self.config, "yaml", lambda: load_config(self.config)),
            "prompts.jsonl": (folder / "prompts.jsonl", "lines", self.prompts("prompts.jsonl")),
            "list.json": (folder / "list.json", "json", lambda: load_questions([str(folder / "list.json")])),
            "table.csv": (folder / "table.csv", None, self.prompts("table.csv")),
            "rollouts": (saved, "lines", lambda: read_rollouts(find_rollouts(folder / "saved") / saved.name, 300)),
            "run's config": (run / "config.yaml", "yaml", lambda: find_resume(config)),
            "latest": (run / "checkpoints" / "latest", None, lambda: find_resume(config)),
            "SHA256SUMS": (checkpoint / "SHA256SUMS", None, lambda: find_resume(config)),
            "inputs.json": (checkpoint / "inputs.json", "json", lambda: read_inputs(checkpoint)),
            "progress.json": (checkpoint / "progress.json", "json", lambda: is_sound(checkpoint)),
            "metrics.jsonl": (run / "metrics.jsonl", "lines", self.older),
            "evaluations.jsonl": (run / "evaluations.jsonl", "lines", self.report),
            "samples.jsonl": (run / "samples.jsonl", "lines", self.report),
            "launches.jsonl": (run / "launches.jsonl", "lines", self.older),
            "events.jsonl": (run / "events.jsonl", "lines", self.report),
        }


@pytest.fixture(scope="module")
def world(tiny_model, tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"), tiny_model("llama"))


NAMES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "weights", "config.yaml"),
    *("prompts.jsonl", "list.json", "table.csv", "rollouts", "run's config", "latest", "inputs.json", "progress.json"),
    "SHA256SUMS",
    *("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "launches.jsonl", "events.jsonl"),
)


def run_cases(world: World, name: str, count: int) -> None:
    path, document, read = world.kinds()[name]
    good = path.read_bytes()
    try:
        for number in range(count):
            seed = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:8])
            content = changed(good, random.Random(seed), document=document)
            path.write_bytes(content)
            try:
                read()
            except UserError:
                pass
            except Exception as error:
                shown = content if len(content) < 3000 else b"..."
                raise AssertionError(f"{name}, case {number}: {type(error).__name__}: {error}\n{shown!r}") from error
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", NAMES)
def test_no_foreign_exception_escapes(world, name):
    run_cases(world, name, 18)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_no_foreign_exception_escapes_in_ten_thousand_cases(world, name):
    run_cases(world, name, 10_000 // len(NAMES) + 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_good_file_is_read(world, name):
    """Otherwise nothing above would be tried."""
    world.kinds()[name][2]()
