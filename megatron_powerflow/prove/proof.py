"""Does the user's layout compute what one process computes? A small run of both on this machine, compared.

    config, config.json --shrink--> FOLDER --processes--> what each has seen --compare--> lines

Left out: what a CPU cannot show (`report.UNPROVEN`). No torch in this process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.checkpoint.folder import EXPORT_NAME, hf_folder_of
from megatron_powerflow.config import Config
from megatron_powerflow.config_file import dump_config
from megatron_powerflow.hf.config import ModelDescription, read_architecture, read_json
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hub.fetch import locate
from megatron_powerflow.hub.located import RequestedName
from megatron_powerflow.parallel.launch import ALONE
from megatron_powerflow.parallel.layout import Layout, plan_layout
from megatron_powerflow.prove.compare import Line, compare
from megatron_powerflow.prove.forks import Failure
from megatron_powerflow.prove.job import Job, Part
from megatron_powerflow.prove.processes import COMMAND, run_processes
from megatron_powerflow.prove.read_seen import read_model, read_seen
from megatron_powerflow.prove.small_config import STEPS, alone_config, config_differences, small_config
from megatron_powerflow.prove.small_files import write_model, write_prompts
from megatron_powerflow.prove.small_layout import differences, job_size, require_few, small_layout
from megatron_powerflow.prove.small_model import model_differences, small_fields
from megatron_powerflow.training.staleness import who_sampled

SEED = 0  # of the weights and prompts


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be proved. layout: the job's; small: of the processes that stand for it."""

    config: Config
    model: ModelDescription
    hf_folder: Path
    layout: Layout
    small: Layout


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of it. shrunk: what the small run has less of. lines: of the parts that came to their end. seconds: all
    of it took."""

    layout: Layout
    small: Layout
    architecture: Architecture
    shrunk: tuple[str, ...]
    lines: tuple[Line, ...]
    failure: Failure | None
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether everything was compared and is equal, or within its bound."""
        return self.failure is None and all(line.holds for line in self.lines)


def subject_of(config: Config, world_size: int | None, *, full: bool) -> Subject:
    """Read what there is to prove. Of a model on the hub, the small files are fetched.

    world_size: processes of the job; None: two replicas. full: with as many processes as the job has. Raises UserError
    where the layout is impossible, or has too many processes for one machine.
    """
    located = locate([RequestedName("model", config.model.hf_path, "model.hf_path")], ALONE, weights=False)
    hf_folder = hf_folder_of(located.folder(config.model.hf_path))
    model = read_architecture(hf_folder, FAMILIES)
    layout = plan_layout(config, model.architecture, world_size or job_size(config))
    if full:
        require_few(layout)
    return Subject(config, model, hf_folder, layout, layout if full else small_layout(layout))


def prove(subject: Subject, say: Callable[[str], None], *, command: Sequence[str] = COMMAND) -> Proof:
    """Make the proof, in processes that end with this one, and in a temporary folder that goes with it.

    say: is told what goes on, a line each. command: see `run_processes`.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="powerflow_prove_") as name:
        folder = Path(name).resolve()
        architecture = prepare(subject, folder)
        shrunk = (
            *differences(subject.layout, subject.small),
            *model_differences(subject.model.architecture, architecture),
            *config_differences(subject.config),
        )
        failure = run_processes(folder, say, command)
        lines = tuple(lines_of(folder, failure))
    return Proof(subject.layout, subject.small, architecture, shrunk, lines, failure, time.monotonic() - start)


def prepare(subject: Subject, folder: Path) -> Architecture:
    """Write everything that the processes start from, and return the small model's architecture. folder: absolute."""
    config, small = subject.config, subject.small
    fields = read_json(subject.hf_folder / "config.json", "the model's config.json")
    wanted = small_fields(fields, subject.model.architecture, subject.model.family, subject.layout, small)
    model = write_model(folder / "model", wanted, seed=SEED)
    sampled_by = who_sampled(config, own=config.rollout.replay is None)
    job = Job(folder, small.world_size, sampled_by, config.run.hang_seconds)
    of_layout = small_config(config, small, folder)
    plan_layout(of_layout, model.architecture, small.world_size)  # else the fault is ours, and is told at once
    configs = {Part.ALONE: alone_config(config, small, folder), Part.LAYOUT: of_layout}
    for part, values in configs.items():
        job.config_path(part).write_text(dump_config(values), encoding="utf-8")
    write_prompts(folder / "prompts.jsonl", STEPS * of_layout.rollout.prompts_per_step, seed=SEED)
    job.write()
    return model.architecture


def lines_of(folder: Path, failure: Failure | None) -> list[Line]:
    """Compare what the processes of a proof have left in its folder; [] where the layout did not come to its end."""
    if failure is not None and failure.part != Part.RESUMED:
        return []
    alone, layout, resumed = (read_seen(folder / "seen" / part.value) for part in Part)
    export = read_model(folder / "run_layout" / EXPORT_NAME)
    return compare(alone, layout, None if failure else resumed, read_model(folder / "model"), export)
