"""The documentation says what is so: commands, keys, paths, messages, links; pages made of the code are current."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
import yaml

from megatron_powerflow.cli import app
from megatron_powerflow.config import Config
from megatron_powerflow.config_file import config_keys, load_config, parse_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.alarm import ALARMS
from megatron_powerflow.metrics.counts import QuestionCounts, mean_over_tasks, summarize_tasks
from megatron_powerflow.metrics.reduce import ReductionSettings, reduce_rollouts, reduce_trained
from megatron_powerflow.metrics.throughput import throughput
from megatron_powerflow.objective.presets import PRESETS
from megatron_powerflow.records import ROLLOUT_COLUMNS
from megatron_powerflow.serving.weight_giving import SyncReport
from megatron_powerflow.training.resume import CHANGEABLE
from tests.conftest import REPOSITORY
from tests.documents import Command, anchors, blocks, commands, links, pages, prose, spans
from tools import make_docs

PAGES = pages()
COMMANDS = [command for page in PAGES for command in commands(page)]
RECIPES = REPOSITORY / "megatron_powerflow" / "recipes"
CLUSTER = ("torchrun", "srun", "sbatch", "docker", "kubectl", "vllm", "pip")  # programs that not every machine has
# Unmarked commands that no run of all commands repeats, because another test runs them
RUN_ELSEWHERE = {
    "bash examples/run_local.sh": "tests/distributed/test_run_local.py::test_run_local_trains_exports_and_shows",
    "bash examples/sweep_alpha.sh": "tests/distributed/test_documented_commands.py::test_the_sweep_over_alpha",
    "bash tests/run.sh": ".ci/run",
    "bash tests/run_pair.sh": "tests/run.sh",  # what it runs, once for each interpreter
    "bash tests/fake_cuda/run.sh": "tests/fake_cuda/run.sh",  # by hand: its environments are large
}
ids = {"ids": lambda value: value.name if isinstance(value, Path) else value.block.place}


@pytest.mark.parametrize("command", COMMANDS, **ids)
def test_a_command_is_one_that_there_is(command: Command):
    words = list(command.words)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # settings of the environment
        words = words[1:]
    check_command(words, command)


@pytest.mark.parametrize("command", COMMANDS, **ids)
def test_what_a_command_needs_stands_above_it(command: Command):
    text = " ".join(command.words)
    elsewhere = any(word in CLUSTER for word in command.words[:2])
    elsewhere = elsewhere or re.search(r"(^| |=)/models/|--push-to-hub|--judge", text)
    if elsewhere or re.search(r"--(data|against) [\w-]+/[\w-]+( |$)", text.replace("examples/", "./examples/")):
        assert command.block.needs, f"{command.block.place}: say above the block what it needs"


def test_every_command_that_needs_nothing_is_run():
    """By `distributed/test_documented_commands.py`, but for these."""
    for place in RUN_ELSEWHERE.values():
        check_place(place)
    for command in COMMANDS:
        first = command.words[0]
        if not command.block.needs and first == "bash":
            assert " ".join(command.words[:2]) in RUN_ELSEWHERE, command.block.place
        if not command.block.needs and first != "bash":
            assert first in ("powerflow", "python"), f"{command.block.place}: nothing runs {first}"


def check_command(words: Sequence[str], command: Command) -> None:
    program, rest = words[0], list(words[1:])
    if program == "powerflow":
        check_powerflow(rest, command)
    elif program == "python" and rest[:2] == ["-m", "megatron_powerflow.cli"]:
        check_powerflow(rest[2:], command)
    elif program == "python" and rest[0] == "examples/own_objective.py":
        check_place(rest[0])
        check_powerflow([word for word in rest[1:] if word != "objective.preset=rl_traj_std"], command)
    elif program == "python":
        check_tool(rest[0], rest[1:])
    elif program in ("torchrun", "srun"):
        start = next(i for i, word in enumerate(rest) if word in ("-m", "python", "examples/own_objective.py"))
        assert all(word.startswith("-") or rest[i - 1].startswith("-") for i, word in enumerate(rest[:start]) if i)
        check_command(["python", *rest[start + (rest[start] == "python") :]], command)
    elif program == "bash":
        check_place(rest[0])
        check_script(rest[0], rest[1:])
    elif program == "sbatch":
        script = next(i for i, word in enumerate(rest) if word.endswith(".sh"))
        check_place(rest[script])
        check_script(rest[script], rest[script + 1 :])
    elif program == "pip":
        check_install(rest)
    elif program == "docker":
        check_place("Dockerfile")
        if "torchrun" in rest:
            check_command(rest[rest.index("torchrun") :], command)
    elif program == "kubectl":
        check_manifest(rest[-1])
    else:
        assert program in ("vllm", "mkdocs"), f"{command.block.place}: {program} is a program that no page explains"


@cache
def the_commands() -> dict:
    return typer.main.get_command(app).commands


def check_powerflow(words: Sequence[str], command: Command) -> None:
    """Parsed by the real command line; its settings by the real config."""
    known = the_commands()
    assert words[0] in known, f"{command.block.place}: no such command: {words[0]}"
    parsed = known[words[0]].make_context(words[0], list(words[1:])).params
    overrides = parsed.get("overrides") or []
    assert {word.partition("=")[0] for word in overrides} <= set(config_keys()), command.block.place
    config = parsed.get("config")
    if words[0] in ("train", "check", "stop", "preflight"):
        own = config == Path("my.yaml")  # a copied recipe
        load_config(RECIPES / "reasoning_base.yaml" if own else REPOSITORY / config, overrides)


def check_tool(path: str, words: Sequence[str]) -> None:
    """One of tools/: its own command line parses the words."""
    check_place(path)
    names: dict = {}
    source = (REPOSITORY / path).read_text(encoding="utf-8")
    exec(compile(source.replace('__name__ == "__main__"', "False"), path, "exec"), names)
    tool = typer.Typer()
    tool.command()(names["main"])
    typer.main.get_command(tool).make_context(path, list(words))


def check_script(path: str, words: Sequence[str]) -> None:
    settings = [word for word in words if re.match(r"\w+\.\w+=", word)]
    if path == "examples/run_local.sh":
        load_config(REPOSITORY / "examples" / "configs" / "local.yaml", words)
    elif path in ("examples/run_7b.sh", "examples/run_70b.sh"):
        options = dict(zip(words[::2], words[1::2], strict=False))
        own = re.search(r"^recipe=(\w+)$", (REPOSITORY / path).read_text(encoding="utf-8"), re.MULTILINE)
        recipe = options.get("--recipe", own[1])
        load_config(RECIPES / f"{recipe}.yaml", settings)
    elif path in ("tests/run.sh", "tests/run_pair.sh", "tests/fake_cuda/run.sh"):
        for word in words:
            if "/" in word:
                check_place(word)
    else:
        assert not words, f"{path}: nothing checks {words}"


def check_install(words: Sequence[str]) -> None:
    tree = ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8"))
    extras = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for word in words:
        if found := re.fullmatch(r"(?:\.|megatron_powerflow)\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= extras
        elif word.endswith(".txt"):
            check_place(word)


def check_manifest(path: str) -> None:
    """A PyTorchJob whose command is one of ours, with the processes that its layout wants."""
    job = yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))
    replicas = job["spec"]["pytorchReplicaSpecs"]
    nodes = sum(part["replicas"] for part in replicas.values())
    for part in replicas.values():
        (container,) = part["template"]["spec"]["containers"]
        words = shlex.split(container["args"][0].removeprefix("exec "))
        assert words[words.index("--nnodes") + 1] == str(nodes)
        settings = words[words.index("train") + 1 : words.index("||")]
        assert words[words.index("||") :] == ["||", "exec", "powerflow", "outcome", settings[-1].partition("=")[2]]
        config = load_config(REPOSITORY / settings[0], settings[1:])
        per_node = int(words[words.index("--nproc-per-node") + 1])
        assert nodes * per_node % (config.parallel.tp * config.parallel.pp * config.parallel.cp) == 0
        assert container["resources"]["limits"]["nvidia.com/gpu"] == per_node


def check_place(place: str) -> None:
    """path, or path::name of a function, class or constant in it."""
    path, _, name = place.partition("::")
    assert (REPOSITORY / path).exists(), f"{path}: is named and is not there"
    if name:
        assert name in names_in(REPOSITORY / path), f"{place}: no such name"


@cache
def names_in(path: Path) -> frozenset[str]:
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, **ids)
def test_what_stands_in_code_exists(page: Path):
    """Keys, paths, and commands with their options."""
    keys, known = set(config_keys()), the_commands()
    for span in spans(page):
        span = span.replace("\\|", "|")
        words = span.split()
        if re.fullmatch(r"(tests|examples|tools|megatron_powerflow|benchmarks|docs)/[\w./-]+(::\w+)?", span):
            check_place(span)
        elif (key := re.match(r"(\w+)\.(?!jsonl?$|py$|lock$)\w+(?==|$)", span)) and key[1] in Config.model_fields:
            assert any(name == key[0] or name.startswith(f"{key[0]}.") for name in keys), f"{page.name}: {span}"
        elif words[0] == "powerflow" and len(words) > 1 and re.fullmatch("[a-z]+", words[1]):
            assert words[1] in known, f"{page.name}: {span}"
            options = {option for parameter in known[words[1]].params for option in parameter.opts}
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert given <= {*options, "--help"}, f"{page.name}: {span}"
        elif words[0] in ("bash", "sbatch", "python") and len(words) > 1:
            module = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1]
            if not (REPOSITORY / module.removesuffix(".py") / "__main__.py").exists():
                check_place(module)


@pytest.mark.parametrize("page", PAGES, **ids)
def test_links_lead_somewhere(page: Path):
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_and_can_be_reached_from_the_readme():
    there = {path.name for path in (REPOSITORY / "docs" / "pages").glob("*.md")}
    assert there == {page.name for page in PAGES} - {"README.md", "CONTRIBUTING.md"}
    named = {Path(target.partition("#")[0]).name for target in links(REPOSITORY / "README.md")}
    assert there - {"answers.md"} <= named  # the README names the file that this page shows


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("name", make_docs.GENERATED)
def test_a_generated_page_is_what_the_code_says(name: str):
    made = make_docs.GENERATED[name]()
    assert (make_docs.PAGES / name).read_text(encoding="utf-8") == made, "run python tools/make_docs.py"


class Text(NamedTuple):
    """A text of the package: its own words in order, anything between them."""

    words: tuple[str, ...]
    pattern: re.Pattern

    @property
    def size(self) -> int:
        return sum(map(len, self.words))

    def found_in(self, line: str) -> re.Match | None:
        return self.pattern.search(line) if all(word in line for word in self.words) else None


def texts() -> list[Text]:
    """Longest first. Short ones say nothing."""
    found = set()
    for path in (REPOSITORY / "megatron_powerflow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp):
                found.add(tuple(filter(None, _literal(node).split("\0"))))
    every = [Text(words, re.compile(".*?".join(map(re.escape, words)))) for words in found if words]
    return sorted((text for text in every if text.size >= 15), key=lambda text: -text.size)


def _literal(node: ast.AST) -> str:
    """The text of an expression; \\0 where something else goes."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_literal(part) if isinstance(part, ast.Constant) else "\0" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(_literal(side) or "\0" for side in (node.left, node.right))
    return ""


def test_messages_are_quoted_as_the_code_prints_them():
    """A line is made of texts of the code and of values; what is no text of the code is a word or four."""
    every = texts()
    quoted = [b.text.splitlines() for page in PAGES for b in blocks(page) if b.language == "message"]
    assert len(quoted) > 10
    for line in (line for lines in quoted for line in lines):
        left = re.sub(r"^(error: |notice +|alarm )", "", line)
        here = [text for text in every if text.found_in(line)]
        assert here, f"no text in the package says: {line}"
        for text in here:
            if match := text.found_in(left):
                left = left[: match.start()] + left[match.end() :]
        words = re.findall(r"\b[A-Za-z]{3,}\b", re.sub(r"\S*[/=._\d]\S*", "", left))  # no paths, keys or numbers
        assert len(words) <= 4, f"{line}\nis not of the code: {left}"


def rollout_table(num_prompts: int, group_size: int, preset: str) -> np.ndarray:
    """Made-up rollouts in which everything that can be measured is there."""
    numbers, count = np.random.default_rng(0), num_prompts * group_size
    every = {name: numbers.uniform(0.1, 1.0, count) for name in ROLLOUT_COLUMNS}
    lengths = numbers.integers(60, 100, count).astype(float)
    policy = -lengths * numbers.uniform(0.5, 1.5, count)
    every |= {
        "rollout_index": np.arange(count, dtype=float),
        "num_response_tokens": lengths,
        "sequence_log_prob": policy,
        "old_sequence_log_prob": policy,
        "rollout_sequence_log_prob": policy,
        "lag_max": (np.arange(count) % 2).astype(float),  # by the weights that train, and by older ones
        "ref_sequence_log_prob": policy * 0.5 - numbers.uniform(0, 3, count),
        "max_log_prob": np.full(count, -0.1),
        "kept": np.ones(count),
        "correct": (np.arange(count) % 2).astype(float),
        "loop_tokens": np.where(np.arange(count) % 5 == 0, 90.0, np.nan),
        "psi": np.zeros(count),
        "reward": np.zeros(count),
    }
    if preset == "balance":  # at the target itself every prompt's lambda rests on all of its rollouts
        every["old_sequence_log_prob"] = 2.0 * every["ref_sequence_log_prob"] + 0.5 * lengths
        every["rollout_sequence_log_prob"] = every["old_sequence_log_prob"]
        every["advantage"] = np.full(count, np.nan)
    else:
        every["residual"] = every["log_z"] = np.full(count, np.nan)
    return np.stack([every[name] for name in ROLLOUT_COLUMNS], axis=1)


def documented(file: str) -> dict[str, set[str]]:
    """Names by the title of their table."""
    (part,) = (part for part in make_docs._data("metrics") if part["file"] == file)
    return {group["title"]: set(group["metrics"]) for group in part["groups"]}


def test_every_number_of_a_step_is_described_and_none_is_made_up():
    found: set[str] = set()
    for preset in ("balance", "rival"):
        settings = ReductionSettings(
            8, 100, alpha=2.0, has_tilt=preset == "balance", energy_per_token=True, has_lag=True
        )
        found |= reduce_rollouts(rollout_table(6, 8, preset), settings).keys()
        found |= reduce_trained(rollout_table(6, 8, preset), settings).keys()
    phases = ("rollout", "reference", "update", "checkpoint", "evaluation", "samples")
    found |= throughput(dict.fromkeys(phases, 1.0), 1.0, 1.0, 1.0).keys()
    found |= {"step", "lr", "grad_norm", "num_skipped", "peak_memory_bytes", "alarm"}  # run_output.py
    found |= {"reference_passes", "reference_known"}
    found |= {f"alarm_{name}" for name in ALARMS}
    found |= SyncReport(1.0, 1, 2, 0.0, 0.0, 1).metrics().keys()
    assert set().union(*documented("metrics.jsonl").values()) == found


def test_the_page_names_every_key_that_may_change_when_a_run_goes_on():
    text = (REPOSITORY / "docs" / "pages" / "reliability.md").read_text(encoding="utf-8")
    section = text[text.index("## What may change") :].partition("What has changed")[0]
    assert set(re.findall(r"`([\w.]+)`", section)) == CHANGEABLE


def test_every_number_of_an_evaluation_is_described():
    question = QuestionCounts("a", (3, 4), (False, True), (0, None), (True, False), (-1.0, -2.0))
    tasks, everything = summarize_tasks([question, question])
    tables = documented("evaluation.json")
    assert tables["A row"] == set(everything)
    assert tables["mean_over_tasks"] == set(mean_over_tasks(tasks))
    source = (REPOSITORY / "megatron_powerflow" / "training" / "in_training_evaluation.py").read_text(encoding="utf-8")
    named = documented("evaluations.jsonl")["Numbers of a line"] - {"alpha_realised"}  # comes with its interval
    assert all(f'"{name}"' in source for name in named)


def test_papers_are_those_that_the_presets_name():
    source = (REPOSITORY / "megatron_powerflow" / "objective" / "presets.py").read_text(encoding="utf-8")
    for name, row in make_docs._data("papers").items():
        assert row["arxiv"] is None or row["arxiv"] in source, name
        config = parse_config(make_docs.SMALLEST, [f"objective.preset={name}", *row["keys"]])
        assert config.objective.form is PRESETS[name]


def test_what_is_claimed_to_be_fast_is_what_was_measured():
    """Every figure of the page stands in benchmarks/README.md, which says how it was come by."""
    figure = re.compile(r"(?<![\w.])(?:\d[\d,]*\.?\d*|\.\d+)(?:e-?\d+)?(?![\w])")
    measured = {_number(text) for text in figure.findall((REPOSITORY / "benchmarks" / "README.md").read_text("utf-8"))}
    page = prose(REPOSITORY / "docs" / "pages" / "performance.md")
    claimed = figure.findall(re.sub(r"`[^`]*`|\]\([^)]*\)", "", page))
    assert len(claimed) > 60
    for text in claimed:
        assert _number(text) in measured or (text.isdigit() and int(text) < 10), text


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def test_the_worked_example_is_the_file():
    (shown,) = (b for b in blocks(REPOSITORY / "docs" / "pages" / "own_objective.md") if b.language == "python")
    assert (REPOSITORY / "examples" / "own_objective.py").read_text(encoding="utf-8").endswith(shown.text + "\n")


def test_the_version_stands_in_every_place_that_states_it():
    from megatron_powerflow import __version__

    changes = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (?!Unreleased)(\S+)", changes, re.MULTILINE)[1] == __version__
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__


def test_what_make_docs_checks_it_also_says(monkeypatch, tmp_path):
    monkeypatch.setattr(make_docs, "REPOSITORY", tmp_path)
    monkeypatch.setattr(make_docs, "PAGES", tmp_path)
    monkeypatch.setattr(make_docs, "GENERATED", {"one.md": lambda: "text\n"})
    with pytest.raises(UserError, match=r"one\.md: is not what the code says"):
        make_docs.main(check=True)
    assert not list(tmp_path.iterdir())
    make_docs.main(check=False)
    make_docs.main(check=True)
    assert (tmp_path / "one.md").read_text() == "text\n"


@pytest.mark.skipif(find_spec("material") is None, reason='the site needs pip install -e ".[docs]"')
def test_the_site_is_built_without_a_warning(tmp_path: Path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "configuration" / "index.html").is_file()
    assert "the answer" in (tmp_path / "answers" / "index.html").read_text(encoding="utf-8").lower()
