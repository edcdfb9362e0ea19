"""What do PowerFlow and its rivals do to one small model? One command: bases, all arms, three seeds, the report.

    python -m examples.dual_nature.study                                                 # half an hour on two cores
    python -m examples.dual_nature.study --groups remedies_g1 remedies_g2 remedies_g3     # what helps against the loop

Every arm is `powerflow train` on la_tb.yaml with a few settings changed, then `powerflow evaluate`; as many at a time
as there are cores, one core each. What is finished is kept: a study that was stopped continues with the next arm.

Left out: the arms (`arms.py`), the tables (`results.py`), the pictures (`powerflow report`).
"""

from __future__ import annotations

import argparse
import gc
import io
import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.dual_nature import corpus
from examples.dual_nature.arms import GROUPS, STANDARD_GROUPS, Arm, Measured, Plan
from examples.dual_nature.corpus import MAX_PROMPT_TOKENS, MAX_RESPONSE_TOKENS
from examples.dual_nature.pretrain import NUM_TRAIN, make_base
from examples.dual_nature.results import write_results
from megatron_powerflow.config_file import load_config
from megatron_powerflow.console import make_console
from megatron_powerflow.parallel.initialize import prepare_imports
from megatron_powerflow.parallel.launch import read_launch
from megatron_powerflow.report.page import build_report
from megatron_powerflow.training.plan import make_plan

CONFIG = Path(__file__).with_name("la_tb.yaml")
WAVE = 2048  # responses decoded at a time
COMMAND = "python -m examples.dual_nature.study"


@dataclass(frozen=True)
class Job:
    """One run to make and examine, or one base to examine, below `out`."""

    out: Path
    plan: Plan
    arm: Arm | Measured
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.arm.name}_s{self.seed}" if isinstance(self.arm, Arm) else self.arm.name

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def base(self) -> Path:
        return self.out / "bases" / self.arm.base

    @property
    def num_steps(self) -> int:
        return self.arm.num_steps if isinstance(self.arm, Arm) else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/dual_nature"), help="folder of everything")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=STANDARD_GROUPS, metavar="GROUP")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time; default: one per core")
    arguments = parser.parse_args()
    console, start = make_console(), time.monotonic()
    study(arguments.out, arguments.groups, arguments.processes, console)
    console.print(f"took {(time.monotonic() - start) / 60:.1f} minutes on {arguments.processes} processes")


def study(out: Path, groups: Sequence[str], num_processes: int, console: Console, plan: Plan | None = None) -> None:
    """Bases, arms of these groups, tables and reports in `out`."""
    pages = {group: (plan or Plan()).of_group(group) for group in groups}
    bases = dict.fromkeys(base for page in pages.values() for base in page.bases)
    jobs = {job.name: job for page in pages.values() for job in jobs_of(out, page)}
    longest_first = sorted(jobs.values(), key=lambda job: -job.num_steps)
    write_questions(out, plan or Plan())
    with pool(num_processes) as executor:
        # the others continue from g2, which must be there first
        for names in (["g2"], [base for base in bases if base != "g2"]):
            finish({executor.submit(make, out, name): name for name in names}, "making bases", console)
        finish({executor.submit(run, job): job.name for job in longest_first}, "training arms", console)
    for group, page in pages.items():
        console.print(write_results(out, group, page))
        folders = [job.folder for job in jobs_of(out, page)]
        console.print(build_report(folders, out / "report" / group, f"{COMMAND} --out {out} --groups {group}"))


def jobs_of(out: Path, plan: Plan) -> list[Job]:
    trained = [Job(out, plan, arm, seed) for arm in plan.arms for seed in range(arm.num_seeds)]
    return trained + [Job(out, plan, measured) for measured in plan.measured]


def pool(num_processes: int) -> ProcessPoolExecutor:
    """Processes that stay: torch and Megatron-Core are imported once in each."""
    return ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), initializer=prepare)


def prepare() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    prepare_imports()


def _end_with_parent() -> None:
    """A run takes SIGTERM for a request to save, so that a study that was ended would leave its runs behind."""
    multiprocessing.parent_process().join()
    os._exit(1)


def finish(futures: dict[Future, str], title: str, console: Console) -> None:
    """Wait for all; a line for each. The first failure ends the study."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=len(futures))
        for number, future in enumerate(as_completed(futures), start=1):
            seconds = future.result()
            console.print(f"{title} {number}/{len(futures)}: {futures[future]}, {seconds:.0f} s")
            bar.advance(task)


def write_questions(out: Path, plan: Plan) -> None:
    """Prompts of the runs, and the held-out questions they are watched and examined with."""
    folder = out / "bases"
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = corpus.split_questions(NUM_TRAIN)
    corpus.write_prompts(folder / "train.jsonl", train)
    corpus.write_prompts(folder / "watched.jsonl", held_out[: plan.num_watched])
    corpus.write_prompts(folder / "examined.jsonl", held_out[: plan.num_examined])


def make(out: Path, name: str) -> float:
    """One base, in a process of the pool. Returns the seconds it took."""
    start = time.monotonic()
    make_base(name, out / "bases")
    return time.monotonic() - start


def run(job: Job) -> float:
    """One job, in a process of the pool, unless it is done already. Returns the seconds it took."""
    start, arm = time.monotonic(), job.arm
    if isinstance(arm, Measured):
        limits = (
            f"rollout.max_prompt_tokens={MAX_PROMPT_TOKENS}",
            f"rollout.max_response_tokens={MAX_RESPONSE_TOKENS}",
        )
        examine(job, job.base, job.folder, f"rollout.temperature={arm.temperature}", *limits)
    elif not (job.folder / "evaluation" / "evaluation.json").is_file():
        train(job, arm)
        gc.collect()
        examine(job, job.folder, job.folder / "evaluation")
    gc.collect()  # process groups of what has ended, whose threads wake a hundred times a second
    return time.monotonic() - start


def train(job: Job, arm: Arm) -> None:
    """`powerflow train`, in this process, to the end; what it prints goes to log.txt in its folder.

    Of a study that was stopped in the middle, the run continues from its last checkpoint.
    """
    from megatron_powerflow.train import train as run_training

    questions = job.out / "bases"
    overrides = [
        f"model.hf_path={job.base}",
        f"prompts.path={questions / 'train.jsonl'}",
        f"evaluation.prompts={questions / 'watched.jsonl'}",
        f"evaluation.num_responses={job.plan.watched_responses}",
        f"evaluation.interval={arm.every}",
        f"rollout.max_concurrent_rows={WAVE}",
        f"run.num_steps={arm.num_steps}",
        f"run.name={arm.name}",
        f"run.seed={job.seed}",
        f"run.output_dir={job.folder}",
        "run.export=false",
        *arm.overrides,
    ]
    console = make_console(io.StringIO(), width=160)
    run_training(make_plan(load_config(CONFIG, overrides), 1), read_launch(), console, command=COMMAND)
    (job.folder / "log.txt").write_text(console.file.getvalue(), encoding="utf-8")


def examine(job: Job, model: Path, folder: Path, *overrides: str) -> None:
    """`powerflow evaluate` on the held-out questions, in this process."""
    from megatron_powerflow.commands.open_model import GENERATE_KEYS, open_model
    from megatron_powerflow.evaluation.evaluate import EvaluationRequest, evaluate

    opened = open_model(model, (f"rollout.max_concurrent_rows={WAVE}", *overrides), GENERATE_KEYS, 1)
    request = EvaluationRequest((str(job.out / "bases" / "examined.jsonl"),), num_responses=job.plan.examined_responses)
    evaluate(opened, request, folder, read_launch(), make_console(io.StringIO()), command=COMMAND)


if __name__ == "__main__":
    main()
