"""How do lines come into the file that `score` or `generate` was asked for? Whole, in order, by one process at a time.

Work goes in rounds over the data-parallel ranks; the main rank writes each round's lines, in the order of the input.

Left out: what the lines are made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_powerflow.console import Heartbeat
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.owner import Owner, held_by_another
from megatron_powerflow.parallel.together import gather_to_main, on_main
from megatron_powerflow.targets import file_refusals, starts_with_line_of
from megatron_powerflow.whole_files import sync

# The keys of the lines of each output file: what tells it from a file of somebody else's.
SCORED = ("id", "log_probs", "sequence_log_prob")
GENERATED = ("id", "response_index", "text", "response_token_ids", "log_probs", "finish_reason")
POWER_SAMPLED = (*GENERATED, "num_accepted", "num_moves")
VERBALIZED = ("id", "response_index", "text", "probability")
BY_GENERATE = (GENERATED, POWER_SAMPLED, VERBALIZED)  # keys of a line, by what `--decoding` says


def write_rounds(
    items: Sequence, one_round: Callable, per_rank: int, out: Path, groups: Groups, console: Console, what: str
) -> None:
    """Deal items to the data-parallel ranks round by round, gather their lines and write them in order.

    one_round: this rank's items -> [(position, line)], None where another rank reports them. what: the command, for the
    progress bar and the lock. `out`, which `output_refusals` judged before, appears when all is done.
    Collective. Raises UserError on all ranks where another process writes `out` by now.
    """
    partial = _partial_of(out)
    with ExitStack() as stack:
        owner = stack.enter_context(Owner(out, _lock_of(out), what))
        on_main(owner.take, groups)
        file = stack.enter_context(partial.open("w", encoding="utf-8")) if groups.is_main else None
        bar = stack.enter_context(progress_bar(console, groups.is_main))
        task = bar.add_task(what, total=len(items))
        for block in blocks(items, per_rank * groups.dp_size):
            gathered = gather_to_main(one_round(block[groups.dp_rank :: groups.dp_size]), groups)
            on_main(owner.confirm, groups)
            if file is not None:
                assert gathered is not None, "by the main rank, which has the file"
                lines = sorted((item for part in gathered if part for item in part), key=lambda item: item[0])
                file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for _, line in lines)
            bar.advance(task, len(block))
        if file is not None:
            file.close()
            sync(partial)
            partial.replace(out)
            sync(out.parent)
    if groups.is_main:
        console.print(f"wrote {out}")


def output_refusals(out: Path, *kinds: Sequence[str]) -> list[str]:
    """Return why `out` may not be written; [] when it may.

    Refused are an `out` or `out`.partial that is no file of lines with the keys of one of these kinds, and an `out`
    that another process writes.
    """
    is_ours = starts_with_line_of(*kinds)
    refusals = file_refusals(out, is_ours) or file_refusals(_partial_of(out), is_ours)
    held_by = held_by_another(out, _lock_of(out))
    return refusals or ([held_by] if held_by else [])


def _partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _lock_of(out: Path) -> Path:
    return out.with_name(out.name + ".lock")


def blocks(items: Sequence, size: int) -> Iterator[Sequence]:
    """Split items into blocks of `size`; the last one has what is left."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def progress_bar(console: Console, is_main: bool) -> Iterator[Progress]:
    """Show a bar on the main rank until the work is done; without a terminal, print a line a minute instead."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not (is_main and console.is_terminal))

    def line() -> str:
        return ", ".join(f"{task.description} {task.completed:.0f}/{task.total:.0f}" for task in bar.tasks)

    with bar:
        if not is_main:
            yield bar
            return
        with Heartbeat(console, line):
            yield bar


ROUND_ROWS = 64  # rows to score, or responses to draw, per data-parallel rank between two writes
