"""Which run stands for the user's? A config for the small model under the layout, and one for a single process.

The first keeps whatever says how the run is split and what is trained: batching, recomputation, the reference, the
distributed optimizer, the objective. The second is the plainest run there is: padded, nothing recomputed or spread.
Both compute in fp32, where layouts differ by the rounding of sums alone.

Left out: sizes of the layout and the model (`small_layout.py`, `small_model.py`). No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_powerflow.config import Config
from megatron_powerflow.config_file import parse_config
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.prove.small_files import MAX_PROMPT_TOKENS

STEPS = 3
MAX_RESPONSE_TOKENS = 24
LEARNING_RATE = 1e-3
# Adam divides by the root of the second moment plus this: at 1e-8 a gradient that is rounding moves a weight as far as
# any other, and two right runs differ by it
EPS = 1e-5
SAMPLER_GAP = 1e9  # nats a token: no run ends by itself where sampler and scorer disagree, and all lines are compared
PROMPTS_OF_REPLICA = 2  # of an update
SOURCE = "the small run's config"


def small_config(config: Config, small: Layout, folder: Path) -> Config:
    """Return the config of the small run under a layout. folder: with `model` and `prompts.jsonl`; runs go there."""
    values = _common(config, small, folder)
    sizes = {name: getattr(small, name) for name in ("tp", "pp", "vpp", "cp", "ep")}
    sizes["layers_per_chunk"] = small.layers and list(small.layers)
    values["parallel"] = config.parallel.model_dump() | sizes | _batching(config, small)
    values["model"] = config.model.model_dump() | {"hf_path": str(folder / "model"), "reference_store": None}
    values["optimizer"]["distributed"] = config.optimizer.distributed
    values["run"]["output_dir"] = str(folder / "run_layout")
    return parse_config(_said(values), source=SOURCE)


def alone_config(config: Config, small: Layout, folder: Path) -> Config:
    """Return the config of the same run on one process. small: the layout that it is compared with."""
    values = _common(config, small, folder)
    values["parallel"] = {"micro_batch_size": 2 if config.rollout.responses_per_prompt > 1 else 1}
    values["model"] = {"hf_path": str(folder / "model")}
    values["run"]["output_dir"] = str(folder / "run_alone")
    return parse_config(_said(values), source=SOURCE)


def config_differences(config: Config) -> list[str]:
    """Return what the small run has less of, for people, beside layout and model."""
    rollout, optimizer = config.rollout, config.optimizer
    texts = [f"texts of up to {MAX_PROMPT_TOKENS} + {MAX_RESPONSE_TOKENS} tokens", f"{STEPS} steps"]
    if config.precision.dtype != "fp32":
        texts.append(f"{config.precision.dtype} as fp32")
    if rollout.responses_per_prompt != _responses(config):
        texts.append(f"{rollout.responses_per_prompt} responses a prompt as {_responses(config)}")
    if optimizer.updates_per_rollout > 2:
        texts.append(f"{optimizer.updates_per_rollout} updates a step as 2")
    texts.append(f"learning rate {LEARNING_RATE:g}, constant")
    if optimizer.eps < EPS:
        texts.append(f"Adam's eps {optimizer.eps:g} as {EPS:g}")
    if rollout.replay is not None:
        texts.append("replayed rollouts as rollouts of the small model")
    elif rollout.engine == "vllm":
        texts.append("responses of vLLM servers as its own, each step by the weights of its step")
    if rollout.buffer_steps:
        texts.append("each step's own rollouts alone")
    if _alpha(config) != config.objective.alpha:
        texts.append(f"alpha {config.objective.alpha:g} as {_alpha(config):g}, for at 1 the loss begins at 0")
    if config.objective.alpha_warmup_steps:
        texts.append("alpha without its warm-up")
    return texts


def _common(config: Config, small: Layout, folder: Path) -> dict[str, dict[str, Any]]:
    """Return what both runs have in common, by section."""
    updates = min(config.optimizer.updates_per_rollout, 2)
    replica = math.lcm(PROMPTS_OF_REPLICA, small.pp) if small.vpp else PROMPTS_OF_REPLICA
    responses = _responses(config)
    if responses == 1:
        replica *= 2
    objective, optimizer = config.objective.model_dump(), config.optimizer.model_dump()
    objective |= {"alpha": _alpha(config)}
    if config.objective.alpha_warmup_steps:
        objective["alpha_warmup_steps"] = 0
    if config.objective.tilt_cap is not None:
        objective["tilt_cap"] = min(config.objective.tilt_cap, MAX_RESPONSE_TOKENS // 2)
    optimizer |= {"lr": LEARNING_RATE, "lr_decay": "constant", "min_lr": None, "warmup_steps": 0, "distributed": False}
    optimizer["eps"] = max(config.optimizer.eps, EPS)
    return {
        "precision": {"dtype": "fp32"},
        "prompts": {"path": str(folder / "prompts.jsonl")},
        "rollout": {
            "prompts_per_step": replica * small.dp * updates,
            "responses_per_prompt": responses,
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "max_response_tokens": MAX_RESPONSE_TOKENS,
            "temperature": config.rollout.temperature,
        },
        "objective": objective,
        "optimizer": optimizer | {"updates_per_rollout": updates},
        "checkpoint": {"interval": 0, "asynchronous": config.checkpoint.asynchronous},
        "evaluation": {"samples": 0},
        "metrics": {"wandb": "off", "curves": False},
        "alarm": {"sampler_gap": SAMPLER_GAP},
        "run": {"num_steps": STEPS, "seed": config.run.seed, "hang_seconds": config.run.hang_seconds},
    }


def _responses(config: Config) -> int:
    """Return the responses of a prompt: 1, 2 or 4, so that any number of stages takes turns of them."""
    wanted = config.rollout.responses_per_prompt
    return 4 if wanted >= 4 else min(wanted, 2)


def _alpha(config: Config) -> float | None:
    """Return the power of the small run. At alpha 1, without a reward, every residual is 0 before the first update."""
    objective = config.objective
    return 2.0 if objective.alpha == 1 and objective.task_reward in (None, "none") else objective.alpha


def _batching(config: Config, small: Layout) -> dict[str, int | None]:
    """Return the sizes of micro-batches: several of them a step, in the way that the user has, padded or packed."""
    micro = config.parallel.micro_batch_size
    if micro is not None:
        return {"micro_batch_size": min(micro, 2), "max_tokens_per_micro_batch": None}
    multiple = small.position_multiple(config.precision.model_copy(update={"dtype": "fp32"}))
    longest = -(-(MAX_PROMPT_TOKENS + MAX_RESPONSE_TOKENS) // multiple) * multiple
    return {"micro_batch_size": None, "max_tokens_per_micro_batch": 2 * longest}


def _said(values: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the values that are given: a key that is None is one that does not apply."""
    return {
        section: {key: value for key, value in keys.items() if value is not None} for section, keys in values.items()
    }
