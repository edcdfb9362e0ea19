"""Which prompts have been answered, by whom, and with what? A ledger, and the answers themselves until they are safe.

    RUN/in_hand/step_000012.sampler_00003.jsonl   a line per prompt: its group, as soon as it came
    RUN/ledger/sampler_00003.jsonl                a line per prompt and step: who answered, with which weights

A group is on the disk before it counts as answered, so a run that breaks off asks only for what it has not. A file of
groups goes when a checkpoint holds what was made of them; the ledger stays. `powerflow inspect` reads it back: every
prompt of every finished step must stand in it once.

Each sampler (a replica, or a context-parallel part of one) writes files of its own; all are read, since a run may go
on with another number of them.

Left out: asking (`pool.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_powerflow.checkpoint.folder import IN_HAND_NAME, LEDGER_NAME
from megatron_powerflow.errors import UserError
from megatron_powerflow.journal import append_lines, cut_back, notes_of, read_journal
from megatron_powerflow.records import Prompt, Rollout, SamplingParams
from megatron_powerflow.rollout.rollout_files import group_line, is_broken, rollouts_of, spans_hold, within_lag
from megatron_powerflow.serving.answers import Answer, request_of

LEDGER_FILE = re.compile(r"sampler_(\d{5,})\.jsonl")
IN_HAND_FILE = re.compile(r"step_(\d{6,})\.sampler_\d{5,}\.jsonl")
SHOWN = 5


class Ledger:
    """The ledger of one sampler.

    vocab_size: token ids of groups that are read are below it. sampler: number of this sampler. lag: how many steps
    older than a step the weights of its responses may be. mixed: whether a response may be by several.
    """

    def __init__(self, folder: Path, sampler: int, *, vocab_size: int, lag: int = 0, mixed: bool = False) -> None:
        self._ledger = folder / LEDGER_NAME / f"sampler_{sampler:05d}.jsonl"
        self._in_hand = folder / IN_HAND_NAME
        self._sampler, self._vocab_size, self._lag, self._mixed = sampler, vocab_size, lag, mixed

    def begin(self, first_step: int, *, num_samplers: int, is_new_course: bool = False) -> None:
        """Take back what a lost try noted of `first_step` and later: what it had in hand is noted again when it is
        used. The first sampler does so for those that there are no more. Raises OSError.

        is_new_course: the weights from here on are others than that try's. Its groups for later steps go, since they
        may be by such weights; those for `first_step` itself are by weights that both have.
        """
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        self._in_hand.mkdir(parents=True, exist_ok=True)
        for path in self._ledger.parent.glob("sampler_*.jsonl"):
            match = LEDGER_FILE.fullmatch(path.name)
            mine = match and (int(match[1]) == self._sampler or (self._sampler == 0 and int(match[1]) >= num_samplers))
            if mine:
                cut_back(path, first_step, ledger_line_violation)
        if is_new_course and self._sampler == 0:
            self._remove_groups(lambda step: step > first_step)

    def found(self, asked: Sequence[tuple[int, Prompt]], sampling: SamplingParams) -> dict[int, tuple[Rollout, ...]]:
        """Return slot -> group of the prompts that an earlier try had in hand, and note that they are answered.

        Only what was asked in the same words counts: prompt, seed, lengths, temperature, stop set; and what is by
        weights that this start may train on. Raises OSError.
        """
        wanted = {slot: _digest(slot, prompt, sampling) for slot, prompt in asked}
        prompts = dict(asked)
        found: dict[int, tuple[Rollout, ...]] = {}
        notes: list[dict[str, Any]] = []
        for path in sorted(self._in_hand.glob(f"step_{sampling.step:06d}.sampler_*.jsonl")):
            for line in read_journal(path).lines:
                slot = line.get("slot")
                if type(slot) is not int or slot in found or wanted.get(slot) != line.get("digest"):
                    continue
                group = self._group(line, prompts[slot])
                places = [(rollout.slot, rollout.response_index) for rollout in group or ()]
                whole = places == [(slot, index) for index in range(sampling.responses_per_prompt)]
                if group and whole and all(self._is_wanted(rollout, sampling.step) for rollout in group):
                    found[slot] = group
                    notes.append(_note(sampling.step, group, str(line.get("server", "")), in_hand=True))
        if notes:
            append_lines(self._ledger, notes)
        return found

    def _is_wanted(self, rollout: Rollout, step: int) -> bool:
        return spans_hold(rollout, step) and within_lag(rollout, step, self._lag, mixed=self._mixed)

    def _group(self, line: dict[str, Any], prompt: Prompt) -> tuple[Rollout, ...] | None:
        """The group of a line; None where it is damaged, or another prompt's."""
        try:
            rollouts = tuple(rollouts_of(line["group"]))
            ours = all(rollout.prompt == prompt and not is_broken(rollout) for rollout in rollouts)
            inside = all(0 <= token < self._vocab_size for r in rollouts for token in r.response_token_ids)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return rollouts if ours and inside and rollouts else None

    def take(self, answer: Answer, rollouts: Sequence[Rollout], sampling: SamplingParams, server: str) -> None:
        """Put a group on the disk, and note that its prompt is answered. Raises OSError."""
        line = {
            "step": sampling.step,
            "slot": answer.slot,
            "digest": _digest(answer.slot, rollouts[0].prompt, sampling),
            "server": server,
            "group": group_line(rollouts),
        }
        append_lines(self._in_hand / f"step_{sampling.step:06d}.sampler_{self._sampler:05d}.jsonl", [line])
        append_lines(self._ledger, [_note(sampling.step, rollouts, server, in_hand=False)])

    def forget(self, before_step: int) -> None:
        """Remove the groups of steps before one that a checkpoint holds. Of this sampler's number or any other's."""
        self._remove_groups(lambda step: step < before_step)

    def _remove_groups(self, of_step: Callable[[int], bool]) -> None:
        for path in self._in_hand.glob("step_*.jsonl"):
            match = IN_HAND_FILE.fullmatch(path.name)
            if match and of_step(int(match[1])) and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def _digest(slot: int, prompt: Prompt, sampling: SamplingParams) -> str:
    body = json.dumps([sampling.step, prompt.id, request_of(slot, prompt, sampling, "")], sort_keys=True)
    return hashlib.sha256(body.encode()).hexdigest()


def _note(step: int, group: Sequence[Rollout], server: str, *, in_hand: bool) -> dict[str, Any]:
    of_step = ((step, 0, 0),)  # a response without versions is by the weights of its step
    weights = sorted({version for rollout in group for version, _, _ in rollout.weight_versions or of_step})
    return {
        "step": step,
        "slot": group[0].slot,
        "prompt": group[0].prompt.id,
        "server": server,
        "weights": weights,
        "tokens": sum(len(rollout.response_token_ids) for rollout in group),
        "in_hand": in_hand,
    }


def ledger_line_violation(line: dict[str, Any]) -> str | None:
    """Say what is wrong with a line of the ledger; None for nothing."""
    whole = all(type(line.get(key)) is int and line[key] >= 0 for key in ("step", "slot"))
    return None if whole and isinstance(line.get("prompt"), str) else "no step, slot and prompt"


def has_ledger(run: Path) -> bool:
    """Whether a run's folder holds a ledger."""
    return (run / LEDGER_NAME).is_dir()


def ledger_report(run: Path, *, num_steps: int, prompts_per_step: int) -> list[str]:
    """Return what the ledger says of the steps that are finished, as lines.

    num_steps: finished. Raises UserError where a prompt was answered twice, or never, or a line is damaged.
    """
    counts: Counter[tuple[int, int]] = Counter()
    servers: Counter[str] = Counter()
    wrong: list[str] = []
    num_tokens = 0
    for path in sorted((run / LEDGER_NAME).glob("sampler_*.jsonl")):
        journal = read_journal(path, ledger_line_violation)
        wrong += notes_of(path, journal.damages)
        for line in journal.lines:
            if line["step"] < num_steps:
                counts[line["step"], line["slot"]] += 1
                servers[str(line.get("server"))] += 1
                num_tokens += line["tokens"] if type(line.get("tokens")) is int else 0
    served = {step for step, _ in counts}  # in others another engine sampled: rollout.engine may change at a start
    wanted = {(step, slot) for step in served for slot in range(prompts_per_step)}
    twice = sorted(place for place, count in counts.items() if count > 1)
    for what, places in (("answered twice", twice), ("never answered", sorted(wanted - set(counts)))):
        if places:
            shown = ", ".join(f"step {step} slot {slot}" for step, slot in places[:SHOWN])
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            wrong.append(f"{run / LEDGER_NAME}: {len(places)} prompts were {what}: {shown}{more}")
    if wrong:
        raise UserError(wrong)
    return [
        f"ledger: {len(wanted):,} prompts of {len(served)} steps, each answered once; {num_tokens:,} tokens",
        *([f"        {num_steps - len(served)} steps have no line: not by servers"] if len(served) < num_steps else []),
        *(f"        {count:,} by {url}" for url, count in servers.most_common()),
    ]
