"""What do the command lines under tools/ share? The processes, the bar, and what is printed at the end.

Left out: converting (`convert.py`) and comparing (`compare.py`), log-probs (`commands/log_prob_parity.py`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_powerflow.converter.compare import CARD_NAME, Comparison, card_refusals, compare, write_card
from megatron_powerflow.converter.convert import ConversionRequest, hf_to_megatron, megatron_to_hf
from megatron_powerflow.converter.model_folders import open_model_folder, total_bytes
from megatron_powerflow.converter.ranks import Ranks
from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.fetch import locate
from megatron_powerflow.hub.located import LocalPaths, RequestedName
from megatron_powerflow.parallel.initialize import cpu_group, prepare_imports
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.targets import require

TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog, being lazy, lets it.",
    "If 3x + 5 = 20, then 3x = 15 and x = 5. Therefore the answer is \\boxed{5}.",
    "def add(a, b):\n    return a + b\n",
)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """Read a size in bytes, as transformers does: "5GB" is 5000000000. Raises UserError when it is not one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", text.strip().upper())
    if match is None or float(match[1]) * UNITS[match[2]] < 1:
        raise UserError(f"--max-shard-size {text!r}: not a size; write it like 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def locate_models(names: Mapping[str, str], launch: Launch) -> LocalPaths:
    """Find models by the option that they were given to; a name on the hub is fetched.

    Raises UserError where one cannot be.
    """
    return locate([RequestedName("model", name, option) for option, name in names.items()], launch)


def convert(request: ConversionRequest, launch: Launch, console: Console, *, to_hf: bool) -> None:
    """Convert with a progress bar, and print what was written. Raises UserError as the conversion does."""
    _quiet()
    started = perf_counter()
    with cpu_group(launch), _bar(console, launch, f"writing {request.out.name}") as (advance, announce):
        ranks = Ranks(launch.rank, launch.world_size)
        comparison = (megatron_to_hf if to_hf else hf_to_megatron)(request, ranks, advance, announce)
    if launch.is_main:
        console.print(f"wrote {request.out} in {perf_counter() - started:.1f} s")
        if comparison is not None:
            console.print(describe(comparison))


def verify(
    a: Path, b: Path, texts: tuple[str, ...] | None, card: Path | None, launch: Launch, console: Console, command: str
) -> Comparison:
    """Compare two model folders and write the card. texts: what both score, None leaves log-probs out.

    Raises UserError where the folders differ, one cannot be read or the card may not be written.
    """
    _quiet()
    path = card or Path(CARD_NAME)
    require(card_refusals(path))
    with cpu_group(launch):
        ranks = Ranks(launch.rank, launch.world_size)
        first = ranks.together(lambda: open_model_folder(a, ranks))
        second = ranks.together(lambda: open_model_folder(b, ranks))
        with _bar(console, launch, "comparing") as (advance, announce):
            announce(total_bytes(first) // launch.world_size)
            comparison = compare(first, second, ranks, advance)
    gap, what = None, "no log-probs: left out"
    if texts is not None and not comparison.differences:
        prepare_imports()
        from megatron_powerflow.commands.log_prob_parity import max_log_prob_difference

        gap, what = max_log_prob_difference(a, b, texts, launch)
    if launch.is_main:
        write_card(path, comparison, a=a, b=b, command=command, max_log_prob_difference=gap)
        console.print(describe(comparison))
        text = what if gap is None else f"log-probs differ by at most {gap:.3g} nats ({what})"
        console.print(f"{text}\nwrote {path}")
    if comparison.differences:
        raise UserError(comparison.differences)
    return comparison


def describe(comparison: Comparison) -> str:
    """Describe a comparison in one line for people."""
    rounded = (
        f", {comparison.num_equal_as_rounded} equal as rounded to {comparison.dtype}"
        if comparison.num_equal_as_rounded
        else ""
    )
    return (
        f"{comparison.num_exactly_equal} of {comparison.num_tensors} tensors equal bit for bit{rounded} "
        f"({comparison.num_bytes / 1e9:.3g} GB, {comparison.family}, sha256 {comparison.sha256[:16]})"
    )


@contextmanager
def _bar(console: Console, launch: Launch, title: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Show a bar of the main rank's bytes. Yields what to call with bytes that are done, and what with all of them."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (launch.is_main and console.is_terminal),
    )
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda size: bar.advance(task, size), lambda size: bar.update(task, total=size)


def _quiet() -> None:
    """Silence torch, which warns that a process alone is alone and which of its functions will change."""
    warnings.filterwarnings("ignore", module=r"torch\..*")
