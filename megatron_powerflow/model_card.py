"""What should a stranger know of an exported model? README.md, a model card, and provenance.json beside the weights.

Written of what the run's folder says; nothing is asked of the network. A licence that the base's own card does not
state is not made up.

Left out: the weights (`hf/live_weights.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_powerflow.checkpoint.folder import CONFIG_NAME, INPUTS_NAME
from megatron_powerflow.config import Config
from megatron_powerflow.config_file import load_recorded_config
from megatron_powerflow.journal import Check, notes_of, read_journal
from megatron_powerflow.metrics.names import METRICS, label
from megatron_powerflow.metrics.provenance import LAUNCHES_NAME, provenance
from megatron_powerflow.metrics.step_log import EVALUATIONS_NAME, without_step
from megatron_powerflow.metrics.writers import read_metrics
from megatron_powerflow.whole_files import ordinary

CARD_NAME, PROVENANCE_NAME = "README.md", "provenance.json"
LAST_STEPS = 10
PLAIN = re.compile(r"\w[\w./-]*")  # as YAML
LICENCE = re.compile(r"^license:\s*['\"]?([\w.+-]+)['\"]?\s*$", re.MULTILINE)


def card_files(run: Path, step: int, command: str, base_folder: Path | None = None) -> dict[str, str]:
    """Return file name -> text of the card and the provenance, for a run's policy after `step` steps.

    command: what exports it. base_folder: where the base model lies, to ask for its licence; None: where the run's
    config says. Damaged lines of the run's journals are left out, and the provenance names them. Raises UserError for a
    damaged config.
    """
    damaged: list[str] = []
    config = load_recorded_config(run / CONFIG_NAME)
    lines = [line for line in read_metrics(run, damaged) if line["step"] < step]
    inputs, base = _json(run / INPUTS_NAME), config.model.hf_path
    revisions = inputs.get("revisions", {}) if isinstance(inputs, dict) else {}
    on_hub = base.removeprefix("hf://").partition("@")[0]
    facts = {
        "base": base,
        "base_revision": revisions.get(on_hub),
        "objective": config.objective.model_dump(exclude_none=True),
        "steps": step,
        "rollouts": step * config.rollout.prompts_per_step * config.rollout.responses_per_prompt,
        "temperature": config.rollout.temperature,
        "prompts": config.prompts.paths,
        "realised": _realised(lines),
        "evaluations": _evaluations(run / EVALUATIONS_NAME, step, damaged),
        "inputs": inputs,
        "launches": _lines(run / LAUNCHES_NAME, damaged, _not_finite),
        "export": provenance(command),
    } | ({"damaged": damaged} if damaged else {})
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    name = on_hub if on_hub in revisions else Path(base).name
    return {
        CARD_NAME: _card(config, facts, name, _licence(base_folder or Path(base))),
        PROVENANCE_NAME: text + "\n",
    }


def _card(config: Config, facts: Mapping[str, Any], base: str, licence: str | None) -> str:
    objective, revision = config.objective, facts["base_revision"]
    named = base if PLAIN.fullmatch(base) else json.dumps(base)
    head = ["---", f"base_model: {named}", *([f"license: {licence}"] if licence else []), "library_name: transformers"]
    head += ["tags:", "- powerflow", "---", "", f"# {base}, {_what(config)}", ""]
    body = [
        f"Trained by PowerFlow (arXiv 2603.18363, `objective.preset={objective.preset}`) from {base}, without labels: "
        f"the policy is to match the base model's distribution{_power(objective.alpha)}.",
        "",
        "| | |",
        "|---|---|",
        f"| base model | {base}{f' at commit {revision}' if revision else ''} |",
        *([f"| alpha, asked | {objective.alpha:g} |"] if objective.alpha is not None else []),
        *_realised_rows(facts["realised"]),
        f"| steps; rollouts | {facts['steps']}; {facts['rollouts']:,} |",
        f"| prompts | {', '.join(Path(path).name for path in facts['prompts'])} |",
        f"| temperature to serve at | {facts['temperature']:g} |",
        f"| licence | {licence or 'that of the base model, which its folder does not state'} |",
        "",
    ]
    body += _evaluation_table(facts["evaluations"])
    body.append(f"How it came about, to the command and the versions: `{PROVENANCE_NAME}`.")
    return "\n".join([*head, *body]) + "\n"


def _evaluation_table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Tabulate the first and the last of the run's own evaluations on its held-out prompts."""
    if not lines:
        return []
    shown = [lines[0], lines[-1]] if len(lines) > 1 else [lines[-1]]
    names = [name for name in METRICS if isinstance(shown[-1].get(name), float)]
    return [
        "On the run's held-out prompts:",
        "",
        "| | " + " | ".join(f"step {line['step']}" for line in shown) + " |",
        "|---" * (1 + len(shown)) + "|",
        *("| " + " | ".join([label(name), *(_value(line, name) for line in shown)]) + " |" for name in names),
        "",
    ]


def _value(line: Mapping[str, Any], name: str) -> str:
    value, error = line.get(name), line.get(f"{name}_se")
    if not isinstance(value, float):
        return ""
    return f"{value:.4g}" + (f" +- {error:.2g}" if isinstance(error, float) and error else "")


def _what(config: Config) -> str:
    alpha = config.objective.alpha
    if alpha is None or alpha == 1:
        return f"trained by {config.objective.preset}"
    return f"{'sharpened' if alpha > 1 else 'flattened'} (alpha {alpha:g})"


def _power(alpha: float | None) -> str:
    return f" to the power {alpha:g}" if alpha is not None else ""


def _realised(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average, over the last steps, the numbers that say how far the policy came."""
    names = ("alpha_realised", "alpha_realised_low", "alpha_realised_high", "alpha_realised_r2")
    last = lines[-LAST_STEPS:]
    series = {name: [line[name] for line in last if name in line and np.isfinite(line[name])] for name in names}
    return {name: float(np.mean(values)) for name, values in series.items() if values}


def _realised_rows(realised: Mapping[str, float]) -> list[str]:
    if "alpha_realised" not in realised:
        return []
    text = f"{realised['alpha_realised']:.2f}"
    if "alpha_realised_low" in realised:
        text += f" [{realised['alpha_realised_low']:.2f}, {realised['alpha_realised_high']:.2f}]"
    return [f"| alpha, realised (last {LAST_STEPS} steps) | {text} |"]


def _licence(base: Path) -> str | None:
    """Return the licence that the base's own model card states; None where it states none."""
    try:
        if not (base / CARD_NAME).is_file():
            return None
        with (base / CARD_NAME).open(encoding="utf-8", errors="replace") as file:
            match = LICENCE.search(file.read(20_000))
    except OSError:
        return None
    return match[1] if match else None


def _evaluations(path: Path, step: int, damaged: list[str]) -> list[dict[str, Any]]:
    """Return the last line of each step up to `step`, without single prompts' values; [] if `step` has none."""
    lines = _lines(path, damaged, lambda line: without_step(line) or _not_finite(line))
    by_step = {line["step"]: line for line in lines}
    if step not in by_step:
        return []
    return [
        {name: value for name, value in by_step[at].items() if name != "by_prompt"}
        for at in sorted(by_step)
        if at <= step
    ]


def _lines(path: Path, damaged: list[str], check: Check) -> list[dict[str, Any]]:
    journal = read_journal(path, check)
    damaged += notes_of(path, journal.damages)
    return journal.lines


def _not_finite(line: Mapping[str, Any]) -> str | None:
    """Say that a line holds NaN or infinity, which no JSON of a provenance may; None where it does not."""
    try:
        json.dumps(line, allow_nan=False)
    except ValueError:
        return "holds a number that is not finite"
    return None


def _json(path: Path) -> Any:
    try:
        return json.loads(ordinary(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
