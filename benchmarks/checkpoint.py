"""How long does training wait for a checkpoint, written while it goes on, and written while it waits?

    synchronous save -> cp of its bytes -> asynchronous save -> cp ...      the same bytes, the same disk, one run

Blocked are the seconds of this process in `Saver.save` and `Saver.settle`: the copy and the plan, and later the index,
the names and `latest`. Between them it does what a step does: it changes the weights. `cp` and its sync take the
checkpoint's own files. Where the disk is the page cache of a busy machine, look at the ratio.

--replicas 2: on so many gloo processes of this machine, whose distributed optimizer gives each a part of the moments.
Seconds and memory are the main rank's; memory: that its process grew by, over all saves.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 16384}
SIZES |= {"num_attention_heads": 12, "num_key_value_heads": 12}
GB = 1e9


@dataclass(frozen=True)
class Timing:
    """Seconds of one save: in which training waited, and until it was whole. cp: of the same files, synced.

    grown: bytes by which this process was larger, at its most until then, than before the first save.
    """

    blocked: float
    whole: float
    cp: float
    num_bytes: int
    grown: int


def measure(config, repetitions: int) -> dict[bool, list[Timing]]:
    """Timings by `asynchronous`, in turn, on this rank. The first saves, which plan who writes what, are left out.
    Collective."""
    from megatron_powerflow.checkpoint.keeping import Keeping
    from megatron_powerflow.checkpoint.saving import Saver
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import read_launch
    from megatron_powerflow.parallel.together import on_main
    from megatron_powerflow.training.plan import make_plan, write_config
    from megatron_powerflow.training.session import build_session

    launch = read_launch()
    plan = make_plan(config, launch.world_size)
    timings: dict[bool, list[Timing]] = {False: [], True: []}

    def begin() -> None:
        plan.run_folder.mkdir(parents=True)
        write_config(plan)
        plan.inputs.write(plan.run_folder)

    with initialized(plan.layout, launch, seed=0) as groups:
        on_main(begin, groups)
        session = build_session(plan, groups)
        _take_a_step(session)
        savers = {
            asynchronous: Saver(
                plan.run_folder,
                groups,
                companions=plan.hf_folder,
                keeping=Keeping(1),
                asynchronous=asynchronous,
                say=print,
            )
            for asynchronous in (False, True)
        }
        start = psutil.Process().memory_info().rss
        for number in range(2 * (repetitions + 3)):
            asynchronous = number % 2 == 1
            timings[asynchronous].append(_one(savers[asynchronous], session, number + 1, plan.run_folder, start))
    return {asynchronous: found[3:] for asynchronous, found in timings.items()}


def _one(saver, session, step: int, run: Path, memory: int) -> Timing:
    from dataclasses import replace

    from megatron_powerflow.parallel.together import on_main

    on_main(os.sync, session.groups)
    begin = time.perf_counter()
    saver.save(session.trainable, replace(session.progress, step=step), wait=False)
    blocked = time.perf_counter() - begin
    while saver.is_pending:
        _take_a_step(session)
        start = time.perf_counter()
        saver.settle()
        blocked += time.perf_counter() - start
    whole = time.perf_counter() - begin
    checkpoint = run / "checkpoints" / f"step_{step:06d}"
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    copied = on_main(lambda: _cp(files, run / "copy"), session.groups)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - memory
    return Timing(blocked, whole, copied, sum(path.stat().st_size for path in files), grown)


def _cp(files: list[Path], folder: Path) -> float:
    folder.mkdir()
    os.sync()
    begin = time.perf_counter()
    for number, path in enumerate(files):
        target = folder / str(number)
        shutil.copyfile(path, target)
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder)
    return seconds


def _take_a_step(session) -> None:
    """AdamW's step of made-up gradients: every weight and moment moves. The ranks end it together, as those of a run
    do; else the next collective would wait for the later one, and that be taken for waiting for the checkpoint."""
    import torch
    import torch.distributed as dist

    for part in getattr(session.trainable.optimizer, "chained_optimizers", [session.trainable.optimizer]):
        for parameter in part.get_parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        part.optimizer.step()
    dist.barrier(group=session.groups.control)


def compare(folder: Path, sizes: dict[str, int], repetitions: int, replicas: int = 1) -> tuple[str, float]:
    """The printed table, and the share of a synchronous save that training waits for an asynchronous one."""
    from rich.table import Table

    from megatron_powerflow.config_file import parse_config
    from megatron_powerflow.console import make_console
    from tests.tiny_models import make_tiny_model

    model = make_tiny_model(folder / "model", "llama", scale=0.02, **sizes)
    prompts = folder / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [5, 6, 7]}\n')
    values = {"model": {"hf_path": str(model)}, "precision": {"dtype": "fp32"}, "prompts": {"path": str(prompts)}}
    values |= {"rollout": {"prompts_per_step": 1, "responses_per_prompt": 2, "max_prompt_tokens": 8}}
    values["rollout"] |= {"max_response_tokens": 8}
    if replicas > 1:
        values["rollout"]["prompts_per_step"] = replicas
        values["optimizer"] = {"distributed": True}
    values |= {"parallel": {"micro_batch_size": 2}, "evaluation": {"samples": 0}}
    values |= {"metrics": {"wandb": "off", "curves": False}, "run": {"output_dir": str(folder / "run")}}
    config = parse_config(values, ())
    found = measure(config, repetitions) if replicas == 1 else _on_ranks(replicas, config, repetitions)
    size = found[True][0].num_bytes
    table = Table(title=f"checkpoints of {size / GB:.2f} GB, medians of {repetitions}")
    for column in ("", "training waits, s", "until it is whole, s", "GB/s", "cp of the same files, GB/s"):
        table.add_column(column, justify="right")

    def median(asynchronous: bool, name: str) -> float:
        return statistics.median(getattr(one, name) for one in found[asynchronous])

    for asynchronous, label in ((False, "synchronous"), (True, "asynchronous")):
        speed, copied = (size / GB / median(asynchronous, name) for name in ("whole", "cp"))
        waits, whole = median(asynchronous, "blocked"), median(asynchronous, "whole")
        table.add_row(label, f"{waits:.3f}", f"{whole:.2f}", f"{speed:.3f}", f"{copied:.3f}")
    share = median(True, "blocked") / median(False, "blocked")
    text = io.StringIO()
    console = make_console(text, width=100)
    console.print(table)
    console.print(f"training waits {100 * share:.1f} % of a synchronous save")
    console.print(f"the process was at most {found[True][-1].grown / GB:.2f} GB larger than before the first save")
    return text.getvalue(), share


def _on_ranks(count: int, config, repetitions: int) -> dict[bool, list[Timing]]:
    from tests.gloo_workers import GlooWorkers

    workers = GlooWorkers()
    try:
        return workers.run(count, measure, config, repetitions)[0]
    finally:
        workers.stop()


def main() -> None:
    from megatron_powerflow.parallel.initialize import prepare_imports

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary one")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=1, help="processes, with a distributed optimizer")
    arguments = parser.parse_args()
    prepare_imports()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        print(compare(Path(scratch), SIZES, arguments.repetitions, arguments.replicas)[0])


if __name__ == "__main__":
    main()
