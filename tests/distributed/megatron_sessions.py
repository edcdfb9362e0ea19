"""What the ranks of a test run: small module-level functions, called through `gloo.run`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_powerflow.config_file import parse_config
from megatron_powerflow.parallel.initialize import initialized
from megatron_powerflow.parallel.launch import read_launch


def config_for(model: Path, prompts: Path, out: Path, *overrides: str):
    """A small fp32 run; overrides as on the command line."""
    values = {
        "model": {"hf_path": str(model)},
        "precision": {"dtype": "fp32"},
        "prompts": {"path": str(prompts)},
        "rollout": {
            "prompts_per_step": 4,
            "responses_per_prompt": 2,
            "max_prompt_tokens": 16,
            "max_response_tokens": 12,
        },
        "parallel": {"micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "metrics": {"wandb": "off", "curves": False},
        "evaluation": {"samples": 0},
        "run": {"output_dir": str(out), "num_steps": 3},
    }
    return parse_config(values, overrides)


@contextlib.contextmanager
def opened_session(config) -> Iterator[tuple]:
    """(plan, session) of a config on this rank."""
    from megatron_powerflow.training.plan import make_plan
    from megatron_powerflow.training.session import build_session

    launch = read_launch()
    plan = make_plan(config, launch.world_size)
    with initialized(plan.layout, launch, seed=config.run.seed) as groups:
        yield plan, build_session(plan, groups)


def run_training(config_file: Path, *overrides: str) -> str:
    """What `powerflow train` does, on this rank; returns what it printed."""
    import io

    from megatron_powerflow.config_file import load_config
    from megatron_powerflow.console import make_console
    from megatron_powerflow.train import train
    from megatron_powerflow.training.plan import make_plan

    launch = read_launch()
    console = make_console(io.StringIO(), width=200)
    train(make_plan(load_config(config_file, overrides), launch.world_size), launch, console)
    return console.file.getvalue()
