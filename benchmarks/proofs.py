"""Does `powerflow prove` hold where a layout is right, and not where it is wrong? A row for each layout.

    python -m benchmarks.proofs [--only NAME ...] [--json FILE]

Each row is proved as a user would, from a published config.json, and then once more with each fault of
tests/planted_faults.py that the layout can have. The seconds are those of the proof without a fault.

Left out: what every fault looks like (tests/planted_faults.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SP = "parallel.sequence_parallel=true"
PACKED = ("parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=4096")
DISTRIBUTED = "optimizer.distributed=true"


@dataclass(frozen=True)
class Row:
    """model: a name of tests/published_configs.py. world_size: of the job."""

    name: str
    model: str
    world_size: int
    overrides: tuple[str, ...] = ()


ROWS = (
    Row("TP2", "Qwen/Qwen2.5-Math-1.5B", 2, ("parallel.tp=2",)),
    Row(
        "TP2 + SP, learned log Z'",
        "Qwen/Qwen3-8B",
        2,
        ("parallel.tp=2", SP, "objective.log_z=mlp", "objective.log_z_detach=false"),
    ),
    Row("TP4 + SP over 2 query groups", "Qwen/Qwen2.5-Math-1.5B", 4, ("parallel.tp=4", SP)),
    Row("PP2, tied", "meta-llama/Llama-3.2-1B", 2, ("parallel.pp=2",)),
    Row("PP3 of 28 layers, uneven", "Qwen/Qwen2.5-Math-1.5B", 3, ("parallel.pp=3",)),
    Row("PP2 x VPP2", "meta-llama/Llama-2-7b-hf", 2, ("parallel.pp=2", "parallel.vpp=2")),
    Row("PP4 x VPP2", "Qwen/Qwen2.5-Math-1.5B", 4, ("parallel.pp=4", "parallel.vpp=2")),
    Row(
        "CP2, packed, 2 updates",
        "Qwen/Qwen2.5-Math-1.5B",
        2,
        (*PACKED, "parallel.cp=2", "optimizer.updates_per_rollout=2"),
    ),
    Row("DP2, distributed optimizer, window", "mistralai/Mistral-7B-v0.1", 2, (DISTRIBUTED,)),
    Row("EP2 of DP4, packed", "mistralai/Mixtral-8x7B-v0.1", 4, (*PACKED, "parallel.ep=2")),
    Row("TP2 x PP2, norms over heads", "allenai/OLMo-2-1124-7B", 4, ("parallel.tp=2", "parallel.pp=2")),
    Row(
        "TP2 x CP2, GRPO",
        "microsoft/Phi-4-mini-instruct",
        4,
        ("parallel.tp=2", "parallel.cp=2", "objective.preset=grpo"),
    ),
    Row(
        "TP2 + SP x CP2 x EP2",
        "Qwen/Qwen3-30B-A3B",
        4,
        ("parallel.tp=2", SP, "parallel.cp=2", "parallel.ep=2", DISTRIBUTED),
    ),
    Row(
        "PP2 x DP2, recomputed, swapped",
        "google/gemma-2-9b",
        4,
        ("parallel.pp=2", "model.recompute=full", "model.reference=swap"),
    ),
    Row(
        "latent attention, TP2 + SP x EP2",
        "deepseek-ai/DeepSeek-V3, its weights in bf16",
        4,
        ("parallel.tp=2", SP, "parallel.ep=2"),
    ),
    Row(
        "the 70B's: TP8 + SP x PP4 x DP2",
        "meta-llama/Llama-3.1-70B",
        64,
        ("parallel.tp=8", SP, "parallel.pp=4", DISTRIBUTED, "model.recompute=selective", "parallel.micro_batch_size=1"),
    ),
    Row(
        "TP2 + SP x PP2 x CP2 x DP2, packed",
        "meta-llama/Llama-3.1-70B",
        16,
        ("parallel.tp=2", SP, "parallel.pp=2", "parallel.cp=2", DISTRIBUTED, *PACKED),
    ),
)


@dataclass(frozen=True)
class Tried:
    """A row's proof, and of each fault what found it; None: nothing did."""

    row: str
    family: str
    processes: int
    seconds: float
    holds: bool
    lines: dict[str, float]  # name of the line -> largest difference
    found_by: dict[str, str | None]

    @property
    def is_right(self) -> bool:
        return self.holds and all(found is not None for found in self.found_by.values())


def try_row(row: Row, folder: Path, faults: Sequence[str] | None = None, say: Callable[[str], None] = print) -> Tried:
    """Prove a row in a folder, without a fault and with each. faults: only these, of those that matter."""
    from megatron_powerflow.config_file import parse_config
    from megatron_powerflow.prove.forks import read_failure
    from megatron_powerflow.prove.processes import run_processes
    from megatron_powerflow.prove.proof import lines_of, prepare, subject_of
    from tests.planted_faults import FAULTS
    from tests.published_configs import PUBLISHED

    folder = folder.resolve()
    model = folder / "user" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(PUBLISHED[row.model]))
    values = {
        "model": {"hf_path": str(model)},
        "prompts": {"path": "prompts.jsonl"},
        "run": {"output_dir": "run"},
    }
    subject = subject_of(parse_config(values, row.overrides), row.world_size, full=False)
    chosen = [name for name, fault in FAULTS.items() if fault.matters(subject) and (faults is None or name in faults)]
    folders = {name: folder / f"fault_{number}" for number, name in enumerate(chosen)}
    clean = folder / "clean"
    for each in (clean, *folders.values()):
        each.mkdir()
        architecture = prepare(subject, each)
    start, ended = time.monotonic(), []

    def heard(phase: str) -> None:
        if phase.startswith("fault:") and not ended:
            ended.append(time.monotonic())
        say(phase)

    planted = [f"{name}={path}" for name, path in folders.items()]
    failure = run_processes(clean, heard, (sys.executable, "-m", "tests.planted_faults", *planted))
    seconds = (ended[0] if ended else time.monotonic()) - start
    if failure is not None:
        raise RuntimeError(f"{row.name}: {failure}")
    lines = lines_of(clean, None)
    found_by: dict[str, str | None] = {}
    for name, path in folders.items():
        failed = read_failure(path)
        found = [line.name for line in lines_of(path, failed) if not line.holds]
        found += [] if failed is None else [f"rank {failed.rank}, {failed.part}: {failed.words[-1][:100]}"]
        found_by[name] = ", ".join(found) or None
    return Tried(
        row.name,
        architecture.family,
        subject.small.world_size,
        seconds,
        all(line.holds for line in lines),
        {line.name: line.largest for line in lines},
        found_by,
    )


def print_table(tried: Sequence[Tried]) -> None:
    from rich.table import Table

    from megatron_powerflow.console import make_console

    table = Table("layout", "family", "processes", "seconds", "without a fault", "faults found")
    for each in tried:
        found = sum(by is not None for by in each.found_by.values())
        table.add_row(
            each.row,
            each.family,
            str(each.processes),
            f"{each.seconds:.0f}",
            "holds" if each.holds else "DIFFERS",
            f"{found} of {len(each.found_by)}",
        )
    console = make_console(width=130)
    console.print(table)
    for each in tried:
        for name, by in each.found_by.items():
            console.print(f"{each.row}: {name}: {by or 'NOT FOUND'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [row.name for row in ROWS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--json", type=Path, help="write the table there as well, after each row")
    arguments = parser.parse_args()
    tried = []
    for row in ROWS:
        if row.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            tried.append(try_row(row, Path(folder), say=lambda phase: None))
        if arguments.json is not None:
            arguments.json.write_text(json.dumps([asdict(each) for each in tried], indent=1) + "\n")
        print(row.name, tried[-1], flush=True)
    print_table(tried)
    return 0 if all(each.is_right for each in tried) else 1


if __name__ == "__main__":
    raise SystemExit(main())
