"""How long does training wait for a checkpoint, written while it goes on, and written while it waits?

    synchronous save -> cp of its bytes -> asynchronous save -> cp ...      the same bytes, the same disk, one run

Blocked are the seconds of this process in `Saver.save` and `Saver.settle`: the copy and the plan, and later the index,
the names and `latest`. Between them it does what a step does: it changes the weights. `cp` and its sync take the
checkpoint's own files. One process; on several, each writes its share. Where the disk is the page cache of a busy
machine, look at the ratio.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 16384}
SIZES |= {"num_attention_heads": 12, "num_key_value_heads": 12}
GB = 1e9


@dataclass(frozen=True)
class Timing:
    """Seconds of one save: in which training waited, and until it was whole. cp: of the same files, synced."""

    blocked: float
    whole: float
    cp: float
    num_bytes: int


def measure(config, repetitions: int) -> dict[bool, list[Timing]]:
    """Timings by `asynchronous`, in turn. The first save of each kind, which plans who writes what, is left out."""
    from megatron_powerflow.checkpoint.keeping import Keeping
    from megatron_powerflow.checkpoint.saving import Saver
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.parallel.launch import ALONE
    from megatron_powerflow.training.plan import make_plan, write_config
    from megatron_powerflow.training.session import build_session

    plan = make_plan(config, 1)
    plan.run_folder.mkdir(parents=True)
    write_config(plan)
    plan.inputs.write(plan.run_folder)
    timings: dict[bool, list[Timing]] = {False: [], True: []}
    with initialized(plan.layout, ALONE, seed=0) as groups:
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
        for number in range(2 * (repetitions + 3)):
            asynchronous = number % 2 == 1
            timings[asynchronous].append(_one(savers[asynchronous], session, number + 1, plan.run_folder))
    return {asynchronous: found[3:] for asynchronous, found in timings.items()}


def _one(saver, session, step: int, run: Path) -> Timing:
    from dataclasses import replace

    os.sync()
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
    return Timing(blocked, whole, _cp(files, run / "copy"), sum(path.stat().st_size for path in files))


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
    """AdamW's step of made-up gradients: every weight and moment moves."""
    import torch

    for part in getattr(session.trainable.optimizer, "chained_optimizers", [session.trainable.optimizer]):
        for parameter in part.get_parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        part.optimizer.step()


def compare(folder: Path, sizes: dict[str, int], repetitions: int) -> tuple[str, float]:
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
    values |= {"parallel": {"micro_batch_size": 2}, "evaluation": {"samples": 0}}
    values |= {"metrics": {"wandb": "off", "curves": False}, "run": {"output_dir": str(folder / "run")}}
    found = measure(parse_config(values, ()), repetitions)
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
    return text.getvalue(), share


def main() -> None:
    from megatron_powerflow.parallel.initialize import prepare_imports

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default: a temporary one")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    prepare_imports()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        print(compare(Path(scratch), SIZES, arguments.repetitions)[0])


if __name__ == "__main__":
    main()
