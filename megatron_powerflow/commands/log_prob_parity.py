"""Do two model folders give the same log-probs? Both through the model and the scorer of training, in fp32.

fp32 whatever the weights are in: the difference is then one of weights and of config, not of arithmetic. The two are
loaded one after the other, in one process.

Left out: the weights themselves, which `converter/compare.py` compares bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from megatron_powerflow.commands.open_model import SCORE_KEYS, OpenModel, load_chunks, open_model
from megatron_powerflow.commands.score import log_probs_by_slot
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.shapes import expected_tensors
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.records import Prompt, Rollout
from megatron_powerflow.training.forward_step import Scorer

MAX_TOKENS = 256  # of a text that are scored
SPREAD_TOKENS = 64
MEMORY_SHARE = 0.6  # of the free memory that the model may take


def max_log_prob_difference(a: Path, b: Path, texts: Sequence[str], launch: Launch) -> tuple[float | None, str]:
    """Return the largest difference of a token's log-prob, in nats, and what was compared.

    The difference is None where several processes run or memory is short; the text then says why. Raises UserError
    where the two tokenizers read a text differently.
    """
    if launch.world_size > 1:
        return None, "no log-probs: several processes; without torchrun they are compared too"
    opened = [open_model(folder, ["precision.dtype=fp32"], SCORE_KEYS, 1) for folder in (a, b)]
    needed = 4 * sum(map(prod, expected_tensors(opened[0].architecture, opened[0].family).values()))
    if needed > MEMORY_SHARE * (free := free_memory_bytes()):
        return None, f"no log-probs: {needed / 1e9:.1f} GB of weights in fp32, {free / 1e9:.1f} GB of memory free"
    rows = [_rows(item, texts) for item in opened]
    if [row.response_token_ids for row in rows[0]] != [row.response_token_ids for row in rows[1]]:
        raise UserError(f"{a} and {b}: their tokenizers read the text differently; copy the tokenizer's files again")
    with initialized(opened[0].layout, launch, seed=0) as groups:
        first, second = (_score(item, rows[0], groups) for item in opened)
    gaps = [abs(x - y) for slot in first for x, y in zip(first[slot], second[slot], strict=True)]
    return max(gaps), f"{len(gaps)} tokens"


def free_memory_bytes() -> int:
    """Return how many bytes Linux can give without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")


def _rows(opened: OpenModel, texts: Sequence[str]) -> list[Rollout]:
    """Make a row of each text: every token but the first is scored, given those before it.

    The last row is of no text but of ids from all over the vocabulary.
    """
    vocab_size, length = opened.architecture.vocab_size, min(MAX_TOKENS, opened.architecture.max_positions)
    spread = [i * vocab_size // SPREAD_TOKENS for i in range(min(SPREAD_TOKENS, length))]
    rows: list[Rollout] = []
    for ids in [*(opened.tokenizer.encode_plain(text)[:length] for text in texts), spread]:
        if len(ids) < 2:
            continue
        prompt, response = Prompt(str(len(rows)), len(rows), tuple(ids[:1])), tuple(ids[1:])
        rows.append(Rollout(prompt, len(rows), 0, response, (0.0,) * len(response), "eos"))
    return rows


def _score(opened: OpenModel, rows: Sequence[Rollout], groups: Groups) -> dict[int, list[float]]:
    chunks = load_chunks(opened, groups)
    scorer = Scorer(groups, opened.architecture.vocab_size, 1.0, opened.layout.sequence_parallel)
    return log_probs_by_slot(rows, chunks, scorer, opened)
