"""Which pages of docs/ are made of the code itself? Configuration, metrics, commands, papers, the map of the house.

python tools/make_docs.py          writes them
python tools/make_docs.py --check  says which are out of date; exit code 2 then

What the code does not say stands in docs/data/*.yaml. Left out: the site (`mkdocs build --strict -f docs/mkdocs.yml`);
all other pages, which people write.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from megatron_powerflow.cli import app
from megatron_powerflow.cli.leaving import exit_codes
from megatron_powerflow.config import Config
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.config_help import SMALLEST, KeyHelp, keys
from megatron_powerflow.config_rules import CONDITIONAL
from megatron_powerflow.errors import UserError
from megatron_powerflow.metrics.names import METRICS
from megatron_powerflow.objective.presets import PRESETS, Balance, Form, PolicyGradient

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "megatron_powerflow"
DATA = REPOSITORY / "docs" / "data"
PAGES = REPOSITORY / "docs" / "pages"
MADE = "<!-- Made by tools/make_docs.py of {source}. Do not edit. -->"
# Settings under which a default may be another one; each is tried alone.
PROBES = (
    *(f"objective.preset={name}" for name in PRESETS),
    "rollout.responses_per_prompt=1",
    "optimizer.updates_per_rollout=2",
    "rollout.replay=RUN",
)
ENABLERS = {  # a setting with which a key has an effect that it has not by itself
    "objective.psi_exempt_tasks": "objective.psi=-0.5",
    "objective.log_z_detach": "objective.log_z=mlp",
    "objective.reward_scale": "objective.task_reward=boxed",
    "objective.reward_advantage": "objective.task_reward=boxed",
    "objective.kl_coefficient": "objective.preset=grpo",
    "objective.clip": "objective.ratio=seq",
    "objective.clip_epsilon": "objective.ratio=seq",
    "objective.sampler_ratio_cap": "objective.sampler_ratio=seq",
    "optimizer.log_z_lr": "objective.log_z=mlp",
    "optimizer.min_lr": "optimizer.lr_decay=cosine",
    "precision.fp8_recipe": "precision.dtype=fp8",
    "precision.fp8_format": "precision.dtype=fp8",
    "parallel.vpp": "parallel.pp=2",
    "evaluation.num_prompts": "evaluation.prompts=FILE",
    "evaluation.num_responses": "evaluation.prompts=FILE",
}
SECTIONS = {
    "model": "What the run starts from.",
    "parallel": "How the model and the rollouts are spread over processes. The data-parallel size follows from the "
    "number of processes: dp = processes / (tp x cp x pp).",
    "precision": "Which numbers the model computes with.",
    "prompts": "What the policy is asked.",
    "rollout": "How responses are sampled.",
    "objective": "What the policy is trained towards.",
    "optimizer": "How the weights move.",
    "checkpoint": "When the state is saved, and how much of it is kept.",
    "evaluation": "What is looked at while the run goes on.",
    "metrics": "Where the numbers go.",
    "alarm": "When alarms ring. Those on lengths compare with the first steps and ask for 5 standard errors besides.",
    "run": "The run itself.",
}


def main(
    check: Annotated[bool, typer.Option("--check", help="write nothing; exit code 2 where one is out of date")] = False,
) -> None:
    """Write the pages of docs/pages that are made of the code.

    Example: python tools/make_docs.py
    """
    stale = []
    for name, make in GENERATED.items():
        path, text = PAGES / name, make()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(f"{path.relative_to(REPOSITORY)}: is not what the code says; run python tools/make_docs.py")
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(REPOSITORY)}")
    if check and stale:
        raise UserError(stale)


def configuration() -> str:
    """Every key: type, default, meaning, what its default depends on, when it has no effect."""
    lines = [
        "# Configuration",
        "",
        "A config is a YAML file of sections. Every key can also be given behind the command as `section.key=value`, "
        "which counts before the file; `null` takes a value away. An unknown key, a wrong type, a value out of its "
        "range and a key that would have no effect are errors. Those of names, types and ranges are reported together, "
        "then those of rules between keys. "
        "`powerflow config KEY` prints the same as this page. Interpolation of other keys, "
        "`${run.output_dir}/x`, is read; nothing else is evaluated.",
        "",
    ]
    rules = {rule[0]: rule for rule in CONDITIONAL}
    described = list(keys())
    for section in Config.model_fields:
        lines += [f"## {section}", "", SECTIONS[section], "", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [_key_row(key, rules.get(key.name)) for key in described if key.name.startswith(f"{section}.")]
        lines.append("")
    return _page("the keys in megatron_powerflow/config.py and the rules in config_rules.py", lines)


def _key_row(key: KeyHelp, rule: tuple | None) -> str:
    meaning = [_cell(_sentence(key.meaning))]
    default = _value(key.default)
    if rule is not None:
        default, more = _conditional(key.name, rule)
        meaning += more
    return f"| `{key.name}` | {_type(key.type)} | {default} | {' '.join(meaning)} |"


def _conditional(name: str, rule: tuple) -> tuple[str, list[str]]:
    """(the default cell, sentences) of a key whose default hangs on other keys."""
    enabler = ENABLERS.get(name)
    usual = _resolved(name, enabler)
    others: dict[str, list[str]] = {}
    for probe in PROBES:
        found = _resolved(name, probe)
        same_key = enabler is not None and probe.partition("=")[0] == enabler.partition("=")[0]
        if found is not None and found != usual and not same_key:
            others.setdefault(_plain(found), []).append(f"`{probe}`")
    sentences = [f"Default with {', '.join(probes)}: `{value}`." for value, probes in others.items()]
    if rule[3]:
        sentences.append(f"No effect, and an error, when {_cell(rule[3])}.")
    known = [preset for preset in PRESETS if _applies(rule, preset, enabler)]
    if known and len(known) < len(PRESETS):
        sentences.append("Presets that know it: " + ", ".join(f"`{preset}`" for preset in known) + ".")
    return _value("" if usual is None else _plain(usual)), sentences


def _resolved(name: str, setting: str | None) -> Any:
    """The value that a key gets when nothing but `setting` is given; None where it has no effect."""
    section, key = name.split(".")
    config = _config(*([setting] if setting else []))
    return None if config is None else getattr(getattr(config, section), key)


def _applies(rule: tuple, preset: str, enabler: str | None) -> bool:
    """Whether a key has an effect with this preset, given what else it needs."""
    more = [enabler] if enabler and not enabler.startswith("objective.preset=") else []
    config = _config(f"objective.preset={preset}", *more)
    return config is not None and rule[2](config)


@cache
def _config(*settings: str) -> Config | None:
    """The smallest config with these settings; None where they cannot stand together."""
    try:
        return parse_config(SMALLEST, settings)
    except UserError:
        return None


def metrics() -> str:
    """Every number, with its denominator."""
    lines = [
        "# Metrics",
        "",
        "Every number that a run or an evaluation writes, and what it is divided by. The column *over* names the "
        "denominator: the things whose mean, share or quantile is taken.",
        "",
    ]
    for part in _data("metrics"):
        lines += [f"## {part['file']}", "", part["about"].strip(), ""]
        for group in part["groups"]:
            lines += [f"### {group['title']}", "", "| name | unit | meaning | over |", "|---|---|---|---|"]
            for name, said in group["metrics"].items():
                said = {"meaning": said} if isinstance(said, str) else said
                unit = said.get("unit") or (METRICS[name].unit if name in METRICS else "")
                over = said.get("over", group["over"])
                lines.append(f"| `{name}` | {unit} | {_cell(_sentence(said['meaning']))} | {_cell(over)} |")
            lines.append("")
    return _page("docs/data/metrics.yaml and megatron_powerflow/metrics/names.py", lines)


def commands() -> str:
    """Every command with its arguments and options."""
    lines = [
        "# Commands",
        "",
        "`powerflow COMMAND --help` prints the same. `MODEL` is a Hugging Face folder, a run's folder, a checkpoint, a "
        "converted checkpoint or a name on the hub. `OVERRIDES` are settings `section.key=value`, as many as wanted. "
        "Commands that open a model take any layout, such as `parallel.tp=2 parallel.pp=4` on 8 processes. "
        "`powerflow --install-completion` lets the shell complete commands and keys.",
        "",
        "Every command ends with one of these exit codes:",
        "",
        "| code | meaning |",
        "|---|---|",
        "| 0 | done |",
        "| 2 | an input is wrong; one line each on stderr says what, and what to do |",
        "| 75 | the run was asked to stop; its state is saved, and the same command continues it. Of `preflight`: a "
        "node is at fault; start again without it |",
        "| 130 | interrupted by Ctrl-C |",
        "| other | a bug, with its traceback |",
        "",
    ]
    for name, command in typer.main.get_command(app).commands.items():
        text, _, example = (command.help or "").partition("Example:")
        lines += [f"## {name}", "", *_paragraphs(text)]
        if example:
            lines += ["Example: `" + " ".join(example.split()) + "`", ""]
        rows = [_parameter_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            lines += ["| argument or option | default | meaning |", "|---|---|---|", *rows, ""]
    return _page("the command line in megatron_powerflow/cli", lines)


def _parameter_row(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    name = ", ".join(parameter.opts) if is_option else parameter.name.upper()
    if is_option and not parameter.is_flag:
        name += f" {parameter.name.upper()}"
    default = parameter.default
    if parameter.required:
        shown = "must be given"
    elif default is None or default is False or not isinstance(default, str | int | float):
        shown = ""
    else:
        shown = f"`{getattr(default, 'value', default)}`"
    text = _sentence(" ".join((parameter.help or "").split()))
    repeatable = " Can be given several times." if is_option and parameter.multiple and "repeatable" not in text else ""
    return f"| `{name}` | {shown} | {_cell(text)}{repeatable} |"


def papers() -> str:
    """A row per preset: formula, source, config line."""
    said = _data("papers")
    if set(said) != set(PRESETS):
        raise UserError(f"docs/data/papers.yaml: must have a row for each preset; {sorted(set(said) ^ set(PRESETS))}")
    lines = [
        "# Objectives and their papers",
        "",
        "One row per `objective.preset`. S and S_ref are the log-probs of a response under the policy and the base "
        "model, n its tokens, w the clipped importance weight, r the reward, A the advantage within the group. "
        "The mean over the kept rollouts of a step is the loss. With an importance ratio a policy gradient takes PPO's "
        "clipped surrogate instead. Where p_base is not in the target, "
        "`objective.kl_coefficient` adds that share of an estimate of KL(policy || base).",
        "",
        "| preset | loss of a rollout | source | arXiv | config |",
        "|---|---|---|---|---|",
    ]
    for name, form in PRESETS.items():
        row = said[name]
        number = row["arxiv"]
        link = f"[{number}](https://arxiv.org/abs/{number})" if number else ""
        settings = " ".join([f"objective.preset={name}", *row["keys"]])
        text = _cell(f"{_sentence(row['source'])} {row['note']}")
        lines.append(f"| `{name}` | `{formula(form)}` | {text} | {link} | `{settings}` |")
    lines += ["", "The rewards r:", "", *(f"- {name}: {text}" for name, text in REWARDS.items()), ""]
    return _page("megatron_powerflow/objective/presets.py and docs/data/papers.yaml", lines)


REWARDS = {
    "power": "`alpha S_ref - S + alpha psi`, the log-ratio of target and policy",
    "power_per_token": "`(alpha S_ref - S)/n + alpha psi`",
    "gold": "1 where the answer is the gold answer",
    "cluster": "the share of the group's responses with the same answer; a response without an answer is alone",
    "majority": "1 where the answer is the group's most common one",
    "certainty": "the mean over tokens of logsumexp - mean of the logits",
    "boxed": "1 where there is an answer in a box",
}


def formula(form: Form) -> str:
    """The loss of one rollout, by the preset's settings."""
    if isinstance(form, Balance):
        if form.per_token:
            return "w mean_t (log Z' + log pi_t - alpha log p_base,t - alpha psi - beta r)^2"
        both = form.policy_norm == form.reference_norm == "length"
        if both:
            energy = "(S - alpha S_ref)/n"
        else:
            parts = {"none": "", "length": "/n"}
            energy = f"S{parts[form.policy_norm]} - alpha S_ref{parts[form.reference_norm]}"
        log_z = "log Z'" if form.per_length else "log Z"
        weight = "w n" if form.weight == "length" else "w"
        return f"{weight} ({log_z} + {energy} - alpha psi - beta r)^2"
    if isinstance(form, PolicyGradient):
        advantage = "A = (r - mean r)/(std r + 1e-6)" if form.divide_by_std else "A = r - mean r"
        return f"-A S{'/n' if form.score_norm == 'length' else ''}, {advantage}, r = {form.reward}"
    return "mean_t H(pi_t)"


def house() -> str:
    """Rooms and floors of the package, from the test that keeps them."""
    floors, said = floors_of_the_house(), _data("rooms")
    rooms = [room for floor in floors for room in floor]
    if set(said) != set(rooms):
        raise UserError(f"docs/data/rooms.yaml: must describe each room; {sorted(set(said) ^ set(rooms))}")
    lines = [
        "# Map of the house",
        "",
        "The package `megatron_powerflow` has rooms, a file or a folder each, on floors. A module imports lower floors "
        "or its own room only, and no room on its own floor; `tests/unit/test_imports.py` keeps it so. `objective` and "
        "`log_probs` import nothing of the package: process groups are arguments there.",
        "",
        "| floor | rooms |",
        "|---|---|",
    ]
    for number in reversed(range(len(floors))):
        lines.append(f"| {number} | {', '.join(f'`{room}`' for room in floors[number])} |")
    lines += ["", "Data flows one way; the records are those of `records.py`:", "", "```text"]
    lines += ["Prompt --rollout--> Rollout --pack--> MicroBatch --score--> + ref_log_probs --update--> StepMetrics"]
    lines += ["```", "", "## Rooms, from the top", ""]
    for floor in reversed(floors):
        for room in floor:
            lines += [f"### {room}", "", _sentence(said[room]), ""]
            modules = list(_modules_of(room))
            if modules:
                lines += [*(f"- `{name}`: {text}" for name, text in modules), ""]
    return _page("FLOORS in tests/unit/test_imports.py, docs/data/rooms.yaml and the modules' first sentences", lines)


def floors_of_the_house() -> tuple[tuple[str, ...], ...]:
    """FLOORS of tests/unit/test_imports.py, which is not imported for it."""
    tree = ast.parse((REPOSITORY / "tests" / "unit" / "test_imports.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["FLOORS"]:
            return ast.literal_eval(node.value)
    raise UserError("tests/unit/test_imports.py: has no FLOORS; this page is made of it")


def _modules_of(room: str) -> Iterator[tuple[str, str]]:
    """(path in the package, first sentence of its docstring) of each module."""
    folder = PACKAGE / room
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if docstring:
            paragraph = " ".join(docstring.partition("\n\n")[0].split())
            sentence = re.match(r".+?[.?!](?=\s|$)", paragraph)
            yield path.relative_to(PACKAGE).as_posix(), sentence[0] if sentence else paragraph


def _data(name: str) -> Any:
    return yaml.safe_load((DATA / f"{name}.yaml").read_text(encoding="utf-8"))


def _page(source: str, lines: list[str]) -> str:
    title, *others = lines  # first, so that the site knows it
    return "\n".join([title, "", MADE.format(source=source), *others]).rstrip() + "\n"


def _paragraphs(text: str) -> list[str]:
    return [line for part in text.strip().split("\n\n") for line in (" ".join(part.split()), "")]


def _sentence(text: str) -> str:
    """With a capital and a full stop, unless it begins with a name or a formula."""
    text = text.strip()
    if re.match(r"(?:a|[a-z]{2,})\b(?![.(_=<])", text):
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _cell(text: str) -> str:
    return _in_code(text).replace("|", "\\|")


def _in_code(text: str) -> str:
    """Keys and what is typed stand in code."""
    sections = "|".join(Config.model_fields)
    text = re.sub(rf"(?<![`\w./])((?:{sections})\.[a-z_]+(?:=[\w-]+(?:\.\w+)*)?)(?![\w`/])", r"`\1`", text)
    return re.sub(r"(?<![`\w])(\\boxed\{\})(?!`)", r"`\1`", text)


def _type(text: str) -> str:
    """Choices in code, types in words. text: as `powerflow config` prints it."""
    known = {"text", "whole number", "number", "mapping", "list of text", "list of number", "list of whole number"}
    words = text.split(" | ")
    if words[0] in known:
        return " or ".join(words)
    plain = next((place for place, word in enumerate(words) if word.startswith("list of ")), len(words))
    parts = [_choices(words[:plain])]
    if plain < len(words):  # true, false or a list of some names
        parts.append("a list of " + _choices([words[plain].removeprefix("list of "), *words[plain + 1 :]]))
    return ", or ".join(parts)


def _choices(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _plain(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(text: str) -> str:
    return text if text in ("", "must be given") else f"`{text}`"


GENERATED: Mapping[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "metrics.md": metrics,
    "commands.md": commands,
    "papers.md": papers,
    "house.md": house,
}


if __name__ == "__main__":
    exit_codes(lambda: typer.run(main))
