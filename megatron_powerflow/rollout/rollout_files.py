"""How do a step's rollouts outlive the step? In a file each, to continue from after a crash or to train on again.

    RUN/rollouts/step_000012.jsonl    first line: what the file is (`Header`); then a line per group of one prompt

Log-probs are fp32 numbers written with all their digits: what is read is what was written, to the last bit. A response
has `weight_versions` only where it was not all by the weights of its step. A file appears under its name when it is
complete, and on disk. Nothing in it is executed.

Left out: who samples and who trains on them (`training/step_rollouts.py`). Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from megatron_powerflow.errors import UserError
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.whole_files import ordinary, write_file

ROLLOUTS_NAME = "rollouts"
FORMAT = 1
SHOWN_STEPS = 5  # of those that an error names


@dataclass(frozen=True, slots=True)
class Header:
    """The first line of a file of rollouts: sizes to compare with a config, and the SHA-256 of the other lines."""

    format: int
    step: int
    num_prompts: int
    responses_per_prompt: int
    vocab_size: int  # of the model that sampled
    temperature: float
    longest_prompt: int  # tokens
    longest_response: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ReplayRequirements:
    """What a run needs of the rollouts that it trains on.

    Group sizes, vocabulary and temperature must be equal to these; the lengths, in tokens, may be up to these.
    """

    num_prompts: int
    responses_per_prompt: int
    vocab_size: int
    temperature: float
    longest_prompt: int
    longest_response: int


# field -> (the key of the config that it is compared with, what to do)
_EQUAL = {
    "num_prompts": ("rollout.prompts_per_step", "set it to that"),
    "responses_per_prompt": ("rollout.responses_per_prompt", "set it to that"),
    "vocab_size": ("the vocabulary of model.hf_path", "rollouts train only models that share their token ids"),
    "temperature": ("rollout.temperature", "set it to that: log-probs belong to one temperature"),
}
_AT_MOST = {"longest_prompt": "rollout.max_prompt_tokens", "longest_response": "rollout.max_response_tokens"}


def step_file(folder: Path, step: int) -> Path:
    """Return the path of a step's rollouts in a folder of such files."""
    return folder / f"step_{step:06d}.jsonl"


def find_rollouts(folder: str | Path) -> Path:
    """Return the folder of step files that a path means: itself, or a run's `rollouts`.

    Raises UserError where neither holds any.
    """
    folder = Path(folder)
    for candidate in (folder / ROLLOUTS_NAME, folder):
        if candidate.is_dir() and any(candidate.glob("step_*.jsonl")):
            return candidate
    raise UserError(
        f"rollout.replay={str(folder)!r}: no step_*.jsonl there nor in its {ROLLOUTS_NAME}/; name the folder of a run "
        "that was made with rollout.save=true"
    )


def write_rollouts(path: Path, rollouts: Sequence[Rollout], *, step: int, vocab_size: int, temperature: float) -> None:
    """Write all rollouts of a step into a file, in whole groups of equal size.

    vocab_size, temperature: of the model and the sampling that drew them. Raises OSError; nothing is left under `path`
    then.
    """
    ordered = sorted(rollouts, key=lambda rollout: (rollout.slot, rollout.response_index))
    groups = [list(members) for _, members in groupby(ordered, key=lambda rollout: rollout.slot)]
    assert groups and len({len(group) for group in groups}) == 1, "whole groups of one size"
    body = "".join(json.dumps(group_line(group), ensure_ascii=False) + "\n" for group in groups).encode()
    header = Header(
        format=FORMAT,
        step=step,
        num_prompts=len(groups),
        responses_per_prompt=len(groups[0]),
        vocab_size=vocab_size,
        temperature=temperature,
        longest_prompt=max(len(group[0].prompt.token_ids) for group in groups),
        longest_response=max(len(rollout.response_token_ids) for rollout in ordered),
        sha256=hashlib.sha256(body).hexdigest(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(asdict(header)).encode() + b"\n" + body)


def read_header(path: Path) -> Header:
    """Read the first line of a file of rollouts.

    Raises UserError where the file cannot be read or is of another format.
    """
    try:
        with ordinary(path).open("rb") as file:
            values = json.loads(file.readline())
        header = Header(**values)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no rollouts that can be read ({' '.join(str(error).split())})") from None
    if header.format != FORMAT:
        raise UserError(f"{path}: of format {header.format!r}; this program reads format {FORMAT}")
    return header


def read_rollouts(path: Path, vocab_size: int) -> list[Rollout]:
    """Read the rollouts of a file, by slot, then by response_index.

    vocab_size: of the model that is trained. Raises UserError where the file is damaged, is not as `write_rollouts`
    writes it, or holds a token outside that vocabulary.
    """
    header = read_header(path)
    try:
        with ordinary(path).open("rb") as file:
            file.readline()
            body = file.read()
    except OSError as error:
        raise UserError(f"{path}: no rollouts that can be read ({error})") from None
    if hashlib.sha256(body).hexdigest() != header.sha256:
        raise UserError(f"{path}: damaged: its content does not have the checksum it was written with; sample it again")
    try:
        rollouts = [rollout for line in body.decode().split("\n") if line for rollout in rollouts_of(json.loads(line))]
        tokens = [token for rollout in rollouts for token in rollout.prompt.token_ids + rollout.response_token_ids]
        outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not rollouts as this program writes them ({error!r}); sample them again") from None
    if outside is not None:
        raise UserError(f"{path}: token {outside} is outside the model's vocabulary of {vocab_size}")
    counted = [(rollout.slot, rollout.response_index) for rollout in rollouts]
    expected = [(slot, i) for slot in range(header.num_prompts) for i in range(header.responses_per_prompt)]
    if counted != expected:
        raise UserError(f"{path}: its groups are not the {len(expected)} rollouts that its first line says")
    if broken := next((r for r in rollouts if is_broken(r)), None):
        raise UserError(
            f"{path}: slot {broken.slot}, response {broken.response_index}: must have tokens, and a log-prob of at "
            "most 0 for each of them"
        )
    if broken := next((r for r in rollouts if not spans_hold(r, header.step)), None):
        raise UserError(
            f"{path}: slot {broken.slot}, response {broken.response_index}: weight_versions are not spans of all "
            f"of its tokens, by weights of step {header.step} or earlier ones; sample them again"
        )
    return rollouts


def replay_violations(folder: Path, steps: range, wanted: ReplayRequirements) -> list[str]:
    """Return why a run cannot train on these files, each reason once; [] when it can.

    Reads first lines only.
    """
    missing = [step for step in steps if not step_file(folder, step).is_file()]
    violations = []
    if missing:
        shown = ", ".join(map(str, missing[:SHOWN_STEPS])) + (", ..." if len(missing) > SHOWN_STEPS else "")
        there = sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.jsonl"))
        violations.append(
            f"rollout.replay={str(folder)!r}: no rollouts of step {shown} (steps {there[0]} to {there[-1]} are there, "
            f"{len(there)} files); lower run.num_steps or save those steps"
        )
    reasons: dict[str, int] = {}  # -> the first step that has it
    for step in steps:
        if step in missing:
            continue
        try:
            header = read_header(step_file(folder, step))
        except UserError as error:
            violations += error.violations
            continue
        for reason in _mismatches(header, step, wanted):
            reasons.setdefault(reason, step)
    return violations + [f"{step_file(folder, step)}: {reason}" for reason, step in reasons.items()]


def _mismatches(header: Header, step: int, wanted: ReplayRequirements) -> list[str]:
    found = [] if header.step == step else [f"holds step {header.step}; files keep the name they were written under"]
    for name, (key, remedy) in _EQUAL.items():
        theirs, ours = getattr(header, name), getattr(wanted, name)
        if theirs != ours:
            found.append(f"{name} is {theirs}, and {key} is {ours}; {remedy}")
    for name, key in _AT_MOST.items():
        theirs, ours = getattr(header, name), getattr(wanted, name)
        if theirs > ours:
            found.append(f"{name} is {theirs} tokens, over {key}={ours}; raise it")
    return found


def is_broken(rollout: Rollout) -> bool:
    log_probs = rollout.rollout_log_probs
    in_order = all(isinstance(value, float | int) and value <= 1e-4 for value in log_probs)
    return not (rollout.response_token_ids and len(log_probs) == len(rollout.response_token_ids) and in_order)


def spans_hold(rollout: Rollout, step: int) -> bool:
    """Whether `weight_versions` are spans of a response's tokens, in order and whole, and of no step behind `step`."""
    spans, end = rollout.weight_versions, 0
    if not spans:
        return True
    if not all(len(span) == 3 and all(type(number) is int for number in span) for span in spans):
        return False
    for version, first, behind in spans:
        if not (0 <= version <= step and first == end < behind):
            return False
        end = behind
    return end == len(rollout.response_token_ids)


def within_lag(rollout: Rollout, step: int, lag: int, *, mixed: bool) -> bool:
    """Whether a step may train on a rollout: by weights at most `lag` steps older, and of one version unless mixed."""
    steps = {version for version, _, _ in rollout.weight_versions}
    return (mixed or len(steps) <= 1) and all(step - version <= lag for version in steps)


def group_line(group: Sequence[Rollout]) -> dict[str, Any]:
    assert all(rollout.prompt == group[0].prompt for rollout in group)
    return {
        "slot": group[0].slot,
        "prompt": asdict(group[0].prompt),
        "responses": [
            {
                "response_index": rollout.response_index,
                "token_ids": rollout.response_token_ids,
                "log_probs": rollout.rollout_log_probs,
                "finish_reason": rollout.finish_reason,
                **({"weight_versions": rollout.weight_versions} if rollout.weight_versions else {}),
            }
            for rollout in group
        ],
    }


def rollouts_of(line: dict[str, Any]) -> list[Rollout]:
    values = line["prompt"]
    prompt = Prompt(**{**values, "token_ids": tuple(values["token_ids"])})
    return [
        Rollout(
            prompt=prompt,
            slot=line["slot"],
            response_index=response["response_index"],
            response_token_ids=tuple(response["token_ids"]),
            rollout_log_probs=tuple(response["log_probs"]),
            finish_reason=response["finish_reason"],
            weight_versions=tuple(map(tuple, response.get("weight_versions", ()))),
        )
        for response in line["responses"]
    ]
