"""What is rehearsed, and as which ranks?

Left out: the rehearsal itself (`phases.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.config import Config
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_architecture
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.parallel.layout import Layout, plan_layout
from megatron_powerflow.training.plan_checks import model_violations

COMPANIONS = (  # of weights, that say nothing without them
    "config.json",
    "generation_config.json",
    "README.md",
    "LICENSE",
)


@dataclass(frozen=True)
class Job:
    """A run as far as its sizes go.

    on: the device that it is rehearsed for. `cuda`: with Transformer Engine where the run would have it, and fused
    kernels. `cpu`: as it would run on this machine, over gloo.
    """

    config: Config
    architecture: Architecture
    layout: Layout
    on: str = "cuda"

    @property
    def is_served(self) -> bool:
        """Whether vLLM servers draw the responses, so that no rank of the run decodes."""
        return self.config.rollout.engine == "vllm" and self.config.rollout.replay is None

    @property
    def longest(self) -> int:
        """The tokens of the longest rollout, prompt and response."""
        return self.config.rollout.max_prompt_tokens + self.config.rollout.max_response_tokens


def holds_config_alone(folder: Path) -> bool:
    """Whether a model's folder has a config.json and neither tokenizer nor weights: enough for sizes."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return "config.json" in names and names <= set(COMPANIONS)


def job_of_config(config: Config, folder: Path, world_size: int) -> Job:
    """Return the job of a model of which there is config.json alone. Raises UserError with every violation."""
    architecture, _ = read_architecture(folder, FAMILIES)
    violations = model_violations(config, architecture)
    try:
        layout = plan_layout(config, architecture, world_size)
    except UserError as error:
        violations += error.violations
    if violations:
        raise UserError(violations)
    return Job(config, architecture, layout)


@dataclass(frozen=True, slots=True)
class RankKind:
    """Ranks that hold and do the same: all tp, cp, dp and ep ranks of a stage.

    rank: the first of them. count: how many there are; name: for people.
    """

    name: str
    rank: int
    count: int


def rank_kinds(job: Job) -> list[RankKind]:
    """Return the kinds of ranks, of which one each is rehearsed.

    Of stages between the first and the last that hold as many layers of each sort the earliest stands for all: under
    1F1B it has the most micro-batches in flight. Without a pipeline there is one kind.
    """
    layout = job.layout
    per_stage = layout.tp * layout.cp * layout.dp
    contents = [_content(job, stage) for stage in range(layout.pp)]
    between = range(1, layout.pp - 1)
    earliest = {contents[stage]: stage for stage in reversed(between)}
    stages = dict.fromkeys((0, *sorted(earliest.values()), layout.pp - 1))
    alike = dict.fromkeys(stages, 1) | {
        stage: sum(contents[other] == content for other in between) for content, stage in earliest.items()
    }
    return [RankKind(_name(stage, layout.pp), stage * per_stage, per_stage * alike[stage]) for stage in stages]


def _content(job: Job, stage: int) -> tuple[int, int]:
    """Return (layers, layers with experts) of a stage."""
    layout, experts = job.layout, job.architecture.experts
    chunks = layout.pp * layout.num_chunks
    counts = layout.layers or (job.architecture.num_layers // chunks,) * chunks
    starts = [sum(counts[:chunk]) for chunk in range(chunks)]
    layers = [
        layer
        for chunk in range(stage, chunks, layout.pp)
        for layer in range(starts[chunk], starts[chunk] + counts[chunk])
    ]
    return len(layers), sum(layer >= experts.first_layer for layer in layers) if experts else 0


def _name(stage: int, num_stages: int) -> str:
    if num_stages == 1:
        return "every rank"
    place = {0: "first", num_stages - 1: "last"}.get(stage, "between")
    return f"stage {stage} ({place})"
