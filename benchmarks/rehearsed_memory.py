"""Does a rehearsal count what a run takes? Bytes of tensors by phase, and the memory of the process, on this CPU.

    python -m benchmarks.rehearsed_memory [--json FILE]

Three runs of a random model of 87 M parameters, each in new gloo processes; every response is as long as it may be. The
bytes of a run are counted at its own tensors in its second step, when Adam's moments are there; those of the rehearsal
are of a process that is one rank after the other and holds no numbers. `process`: what the process's resident memory
grew by from before the model to its most, against the most that was rehearsed.

Left out: GPUs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

LIMIT, PROCESS_LIMIT = 0.05, 0.20
SIZES = {
    "vocab_size": 24000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
PACKED = ("parallel.micro_batch_size=null", "parallel.max_tokens_per_micro_batch=768")
RUNS = {
    "1 process, padded": (1, ()),
    "tp 2, sequence parallel, packed": (2, ("parallel.tp=2", "parallel.sequence_parallel=true", *PACKED)),
    "pp 2 x dp 2, distributed optimizer, swapped": (
        4,
        ("parallel.pp=2", "optimizer.distributed=true", "model.reference=swap"),
    ),
}
# a phase of a run -> those of the rehearsal that it consists of
PHASES = {
    "held": ("gradients, optimizer",),
    "rollout": ("prefill", "decoding"),
    "reference": ("reference scores",),
    "update": ("update", "optimizer step"),
}


@dataclass(frozen=True)
class Compared:
    """A phase of a rank: bytes that were rehearsed, and found."""

    run: str
    rank: int
    phase: str
    rehearsed: int
    found: int

    @property
    def error(self) -> float:
        """The rehearsal's error, relative to what was found."""
        return self.rehearsed / self.found - 1

    @property
    def agrees(self) -> bool:
        return abs(self.error) <= (PROCESS_LIMIT if self.phase == "process" else LIMIT)


def write_config(folder: Path) -> Path:
    from tests.tiny_models import make_tiny_model

    make_tiny_model(folder / "model", "llama", rope=None, tie_word_embeddings=False, eos_token_id=23999, **SIZES)
    prompts = [{"prompt_token_ids": list(range(5 + i, 5 + i + 128))} for i in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    config = folder / "config.yaml"
    config.write_text(
        f"""
model: {{hf_path: {folder / "model"}}}
precision: {{dtype: fp32}}
prompts: {{path: {folder / "prompts.jsonl"}}}
rollout: {{prompts_per_step: 4, responses_per_prompt: 4, max_prompt_tokens: 128, max_response_tokens: 64}}
parallel: {{micro_batch_size: 4}}
objective: {{alpha: 2, log_z: mlp}}
checkpoint: {{interval: 0}}
metrics: {{wandb: "off", curves: false}}
run: {{num_steps: 2, output_dir: {folder / "run"}}}
"""
    )
    return config


def counted(config: Path, *overrides: str) -> dict[str, int]:
    """The bytes of a real run on this rank, by phase; `process`: what its resident memory grew by. Collective."""
    import resource

    import psutil

    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.rehearsal.live_bytes import LiveBytes
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session
    from megatron_powerflow.training.step import run_step

    launch = read_launch()
    plan = make_plan(load_config(config, overrides), launch.world_size)
    with initialized(plan.layout, launch, seed=0) as groups, LiveBytes("cpu", {}) as recorder:
        before = psutil.Process().memory_info().rss
        session = build_session(plan, groups)
        run_step(plan, session, plan.prompts, 0)
        held = recorder.now
        run_step(plan, session, plan.prompts, 1, phase=recorder.phase)
        most = {phase.name: phase.peak for phase in recorder.phases}
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"held": held, **{name: most[name] for name in ("rollout", "reference", "update")}, "process": grown}


def rehearse(config: Path, world_size: int, overrides: list[str]) -> dict[int, dict[str, int]]:
    """The same of a rehearsal: by the first rank of each kind. In a process of its own."""
    from megatron_powerflow.rehearsal.prepare import prepare

    prepare()
    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.rehearsal.job import Job, rank_kinds
    from megatron_powerflow.rehearsal.phases import rehearse_rank
    from megatron_powerflow.training.plan import make_plan

    plan = make_plan(load_config(config, overrides), world_size)
    job = Job(plan.config, plan.architecture, plan.layout, on="cpu")
    found = {}
    for kind in rank_kinds(job):
        rank = rehearse_rank(job, kind)
        found[kind.rank] = {name: max(rank.phase(part).peak for part in parts) for name, parts in PHASES.items()}
        found[kind.rank]["held"] = rank.phase("KV cache").before
        found[kind.rank]["process"] = rank.peak
    return found


def compare(name: str) -> list[Compared]:
    from tests.gloo_workers import GlooWorkers

    world_size, overrides = RUNS[name]
    with tempfile.TemporaryDirectory() as work:
        config = write_config(Path(work))
        command = [sys.executable, "-m", "benchmarks.rehearsed_memory", "--rehearse", str(config), str(world_size)]
        rehearsed = json.loads(subprocess.run([*command, *overrides], check=True, stdout=subprocess.PIPE).stdout)
        workers = GlooWorkers()
        found = workers.run(world_size, counted, config, *overrides)
        workers.stop()
    return [
        Compared(name, int(rank), phase, value, found[int(rank)][phase])
        for rank, phases in rehearsed.items()
        for phase, value in phases.items()
    ]


def print_table(rows: list[Compared]) -> None:
    from rich.table import Table

    from megatron_powerflow.console import make_console

    table = Table("run", "rank", "phase", "rehearsed, MB", "found, MB", "error", "")
    for row in rows:
        sizes = (f"{row.rehearsed / 1e6:,.1f}", f"{row.found / 1e6:,.1f}", f"{row.error:+.1%}")
        table.add_row(row.run, str(row.rank), row.phase, *sizes, "agrees" if row.agrees else "DIFFERS")
    make_console(width=130).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the table there as well")
    parser.add_argument("--rehearse", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rehearse:
        config, world_size, *overrides = arguments.rehearse
        print(json.dumps(rehearse(Path(config), int(world_size), overrides)))
        return 0
    rows = [row for name in RUNS for row in compare(name)]
    print_table(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 0 if all(row.agrees for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
