"""Which log-probs does a model give the responses in a file? `powerflow score`, with the scorer of training.

Left out: how the lines come into their file (`rounds.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_powerflow.commands.open_model import OpenModel, load_chunks, say_notices
from megatron_powerflow.commands.rounds import ROUND_ROWS, SCORED, output_refusals, write_rounds
from megatron_powerflow.data.packing import AnnotatedRollout, pack
from megatron_powerflow.data.prompts import check_token_ids, prompt_token_ids
from megatron_powerflow.data.rows import read_file
from megatron_powerflow.data.tokenizer import Tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.together import largest
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.targets import require
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.micro_batches import padded_multiple
from megatron_powerflow.training.score import score

FILLER = Rollout(Prompt("", 0, (0,)), -1, 0, (0,), (0.0,), "eos")  # scored and thrown away
SHOWN_ROWS = 20  # of those whose log-probs are not finite


def score_file(opened: OpenModel, data: str | Path, out: Path, launch: Launch, console: Console) -> None:
    """Score the responses in `data`, a file or one on the hub, and write one JSON line per row.

    A line holds id, log_probs (nats, one per response token) and sequence_log_prob. Raises UserError when `out` may
    not be written or rows are bad.
    """
    say_notices(opened, launch, console)
    require(output_refusals(out, SCORED))
    rows = read_scored_rows(opened.located.file(data), opened)
    with initialized(opened.layout, launch, seed=0) as groups:
        chunks = load_chunks(opened, groups)
        scorer = Scorer(
            groups, opened.architecture.vocab_size, opened.config.rollout.temperature, opened.layout.sequence_parallel
        )
        reports = groups.is_last_stage and groups.tp_rank == 0

        def one_round(round_rollouts: Sequence[Rollout]) -> list[tuple[int, dict]] | None:
            rows = _as_many_as_others(round_rollouts, groups)
            scored_lines = score_rollouts(rows, chunks, scorer, opened) if rows else []
            return [(slot, line) for slot, line in scored_lines if slot != FILLER.slot] if reports else None

        write_rounds(rows, one_round, ROUND_ROWS, out, groups, console, "powerflow score")
    if launch.is_main:
        for line in not_finite_lines(out):
            console.print(line)


def not_finite_lines(out: Path) -> list[str]:
    """Say which rows of a scored file hold log-probs that are not finite, and from which token on; [] where none does.

    Such numbers stand in the file as NaN, Infinity and -Infinity, which Python's JSON reads.
    """
    bad, num_rows = [], 0
    with out.open(encoding="utf-8") as file:
        for line in file:
            num_rows += 1
            if "NaN" not in line and "Infinity" not in line:
                continue
            row = json.loads(line)
            places = [place for place, value in enumerate(row["log_probs"], start=1) if not math.isfinite(value)]
            if places:  # else the id was spelt so
                bad.append(f"  {row['id']}: {len(places)} of {len(row['log_probs'])} tokens, the first is {places[0]}")
    if not bad:
        return []
    more = [f"  and {len(bad) - SHOWN_ROWS} more"] if len(bad) > SHOWN_ROWS else []
    return [f"{len(bad)} of {num_rows} responses have log-probs that are not finite:", *bad[:SHOWN_ROWS], *more]


def _as_many_as_others(rollouts: Sequence[Rollout], groups: Groups) -> list[Rollout]:
    """Fill up with FILLER: ranks that share experts must make the same number of forward passes."""
    return [*rollouts, *[FILLER] * (largest(len(rollouts), groups) - len(rollouts))]


def score_rollouts(
    rollouts: Sequence[Rollout], chunks: Sequence[PolicyModel], scorer: Scorer, opened: OpenModel
) -> list[tuple[int, dict]]:
    """Return (slot, output line) of each rollout on the last stage, an empty list elsewhere."""
    by_slot = {rollout.slot: rollout for rollout in rollouts}
    return [
        (slot, {"id": by_slot[slot].prompt.id, "log_probs": log_probs, "sequence_log_prob": sum(log_probs)})
        for slot, log_probs in log_probs_by_slot(rollouts, chunks, scorer, opened).items()
    ]


def log_probs_by_slot(
    rollouts: Sequence[Rollout], chunks: Sequence[PolicyModel], scorer: Scorer, opened: OpenModel
) -> dict[int, list[float]]:
    """Return slot -> log-probs (nats) of the response's tokens on the last stage, {} elsewhere. Slots are unique."""
    micro_batch_size = opened.config.parallel.micro_batch_size
    assert micro_batch_size is not None, "no command may ask for packing"
    batches = pack(
        [AnnotatedRollout(rollout) for rollout in rollouts],
        micro_batch_size=micro_batch_size,
        responses_per_prompt=1,
        drop_truncated=False,
        multiple=padded_multiple(opened.layout, opened.config.precision, scorer.groups.device),
        uniform=False,
        device=scorer.groups.device,
    )
    log_probs = {}
    for batch, scored in zip(batches, score(chunks, batches, scorer), strict=True):
        if scored is None:
            continue
        for row, slot in enumerate(batch.group.tolist()):
            log_probs[slot] = scored[row][batch.loss_mask[row]].tolist()
    return log_probs


def read_scored_rows(path: Path, opened: OpenModel) -> list[Rollout]:
    """Read the rows to score: a prompt in any of its forms, and `response` (text) or `response_token_ids`.

    A text is scored as it is, without an EOS behind it. Raises UserError with the bad lines.
    """
    vocab_size, tokenizer = opened.architecture.vocab_size, opened.tokenizer
    rows: list[Rollout] = []
    violations: list[str] = []
    for number, row in read_file(path, violations):
        try:
            prompt = prompt_token_ids(row, tokenizer, vocab_size)
            response = _response_token_ids(row, tokenizer, vocab_size)
        except UserError as error:
            violations.append(f"{path}:{number}: {error}")
            continue
        total = len(prompt) + len(response)
        if total > opened.architecture.max_positions:
            violations.append(f"{path}:{number}: {total} tokens, over the model's {opened.architecture.max_positions}")
        identity = str(row.get("id", number - 1))
        rows.append(
            Rollout(
                prompt=Prompt(identity, number - 1, tuple(prompt)),
                slot=len(rows),
                response_index=0,
                response_token_ids=tuple(response),
                rollout_log_probs=(0.0,) * len(response),
                finish_reason="eos",
            )
        )
    if violations or not rows:
        raise UserError(violations or [f"{path}: no rows in it"])
    return rows


def _response_token_ids(row: dict[str, Any], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    given = [name for name in ("response", "response_token_ids") if row.get(name) is not None]
    if len(given) != 1:
        raise UserError(f"needs exactly one of response, response_token_ids; got {given or sorted(row)[:8]}")
    if given[0] == "response_token_ids":
        return check_token_ids(row["response_token_ids"], vocab_size, "response_token_ids")
    if not isinstance(row["response"], str):
        raise UserError(f"response must be a text, got {row['response']!r:.60}")
    return check_token_ids(tokenizer.encode_plain(row["response"]), vocab_size, "response (tokenized)")
