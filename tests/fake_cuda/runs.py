"""How does a run of the product go on the fake GPU? As on a real one: its own plan, session and steps, on one rank.

A case names what varies. `planned` writes config and files and plans the run for all n ranks. `opened` builds the
session of rank r: weights are read from a Hugging Face folder, DDP and the optimizers are Megatron-Core's. What runs
then is the product's: sampling, packing, scoring, updates.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.fake_cuda import kernels
from tests.fake_cuda.device import FakeGpu
from tests.fake_cuda.world import World

if TYPE_CHECKING:
    from megatron_powerflow.parallel.launch import Launch
    from megatron_powerflow.training.plan import Plan
    from megatron_powerflow.training.session import Session

# kind of GPU -> what it computes with: bf16, or a precision.fp8_recipe
RECIPES = {"h100": ("bf16", "tensorwise", "blockwise"), "b200": ("bf16", "tensorwise", "mxfp8")}
# every size is a multiple of 32 on each of 8 ranks, so that all recipes can multiply it
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "scale": 0.05,
}


@dataclass(frozen=True)
class Case:
    """A layout, a precision, a way to batch. recipe: bf16, or one of precision.fp8_recipe. changes: of the config, by
    dotted keys."""

    recipe: str = "bf16"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    rank: int = 0
    packed: bool = False
    sequence_parallel: bool = True
    prompt_tokens: tuple[int, ...] = (93, 49)
    response_tokens: int = 7
    changes: tuple[tuple[str, object], ...] = ()

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def overrides(self, model: Path, folder: Path) -> list[str]:
        """Return the run's config as overrides of the defaults."""
        values = {
            "model.hf_path": model,
            "prompts.path": folder / "prompts.jsonl",
            "run.output_dir": folder / "run",
            "run.num_steps": 3,
            "parallel.tp": self.tp,
            "parallel.pp": self.pp,
            "parallel.sequence_parallel": self.sequence_parallel and self.tp > 1,
            "precision.dtype": "bf16" if self.recipe == "bf16" else "fp8",
            "rollout.prompts_per_step": len(self.prompt_tokens),
            "rollout.responses_per_prompt": 4,
            "rollout.max_prompt_tokens": max(self.prompt_tokens),
            "rollout.max_response_tokens": self.response_tokens,
            "objective.alpha": 2,
            "objective.log_z": "mlp",
            "metrics.wandb": "off",
            "metrics.curves": "false",
            "evaluation.samples": 0,
        }
        if self.recipe != "bf16":
            values["precision.fp8_recipe"] = self.recipe
        values |= {"parallel.max_tokens_per_micro_batch": 512} if self.packed else {"parallel.micro_batch_size": 2}
        return [f"{key}={value}" for key, value in (values | dict(self.changes)).items()]


@dataclass(frozen=True)
class Run:
    """A session of the product on the fake GPU. plan, session: the product's.

    calls: phase of a step -> which kernels it called (`kernels.calls`).
    """

    gpu: FakeGpu
    world: World
    plan: Plan
    session: Session
    calls: dict[str, Counter] = field(default_factory=dict)

    @property
    def chunks(self) -> list:
        """The policy's model chunks on this rank."""
        return self.session.trainable.chunks

    def step(self, step: int = 0):
        """Run a whole step of the product: `StepResult`."""
        from megatron_powerflow.training.step import run_step

        return run_step(self.plan, self.session, self.plan.prompts, step, phase=self._phase)

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        before = Counter(kernels.calls)
        yield
        self.calls[name] = self.calls.get(name, Counter()) + (kernels.calls - before)


def planned(case: Case, model: Path, folder: Path, *changes: str) -> Plan:
    """Write the files of a run of this case, and plan it. changes: further overrides of its config."""
    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.training.plan import make_plan

    prompts = [{"prompt_token_ids": [5 + i % 90 for i in range(length)]} for length in case.prompt_tokens]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "config.yaml").write_text("")
    config = load_config(folder / "config.yaml", [*case.overrides(model, folder), *changes])
    return make_plan(config, case.world_size)


@contextlib.contextmanager
def on_fake_gpu(rank: int, world_size: int) -> Iterator[tuple[FakeGpu, World, Launch]]:
    """Make this process rank `rank` of `world_size`, on a GPU of its own, while the context is open."""
    from megatron_powerflow.parallel.initialize import prepare_imports, tear_down
    from megatron_powerflow.parallel.launch import Launch

    prepare_imports()
    world = World(rank, world_size)
    world.install()
    try:
        with FakeGpu(world) as gpu:
            yield gpu, world, Launch("torchrun", rank, world_size, rank % 8, 8)
    finally:
        tear_down()  # where something raised, the product leaves that to the end of the process


@contextlib.contextmanager
def opened(case: Case, model: Path, folder: Path) -> Iterator[Run]:
    """Build the session of a case in an empty folder, and take its process groups down afterwards."""
    from megatron_powerflow.parallel.initialize import initialized
    from megatron_powerflow.training.session import build_session

    plan = planned(case, model, folder)
    with on_fake_gpu(case.rank, case.world_size) as (gpu, world, launch):
        with initialized(plan.layout, launch, seed=0) as groups:
            yield Run(gpu, world, plan, build_session(plan, groups))
