"""What of a config, beside its layout and its prompts' files, makes a run impossible?

Each check says all that it finds, and what to do about it. Left out: in which order they are asked (`plan.py`), what a
run needs of the machine (`resources.py`).
"""

from __future__ import annotations

from pathlib import Path

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.checkpoint.folder import CHECKPOINTS_NAME, EXPORT_NAME, is_converted
from megatron_powerflow.config import Config
from megatron_powerflow.data.prompts import LoadedPrompts
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.checked import open_checked
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.files import SafetensorsFolder
from megatron_powerflow.hub.located import LocalPaths
from megatron_powerflow.model.precision import fp8_model_violations
from megatron_powerflow.model.recompute import recompute_violations
from megatron_powerflow.parallel.launch import environment_secrets
from megatron_powerflow.redaction import holds_secret
from megatron_powerflow.rollout.rollout_files import ReplayRequirements, find_rollouts, replay_violations
from megatron_powerflow.targets import export_target
from megatron_powerflow.training.reference_base import kept_scores_violations
from megatron_powerflow.training.resources import buffer_violations


def secret_violations(config: Config) -> list[str]:
    """Where the config holds a key or a password: config.yaml, wandb and the model card would state it."""
    secrets = environment_secrets()
    return [
        f"{section}.{key}: holds a password, or the value of a key in the environment, and would stand in config.yaml, "
        "wandb and the model card; take it out"
        for section, values in config.model_dump().items()
        for key, value in values.items()
        if holds_secret(str(value), secrets)
    ]


def model_violations(config: Config, architecture: Architecture) -> list[str]:
    """Say what the config asks of the model that it cannot do: FP8 on its layers, longer texts than its positions."""
    violations = fp8_model_violations(config.precision, architecture, config.parallel)
    violations += recompute_violations(config.model, config.precision, architecture, config.parallel.cp)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if longest <= architecture.max_positions:
        return violations
    return [
        *violations,
        f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} is over the model's "
        f"{architecture.positions_field}={architecture.max_positions}; lower one of them",
    ]


def look_at_weights(
    config: Config, located: LocalPaths, weights: bool, architecture: Architecture, family: Family
) -> list[str]:
    """Raise UserError where the tensors are not those of config.json; say it where they are not looked at.

    A converted checkpoint was checked as it was written, and says so of its files.
    """
    if notice := _weights_elsewhere(config, located, weights):
        return [notice]
    if not is_converted(start := located.folder(config.model.hf_path)):
        open_checked(start, architecture, family)
    return []


def _weights_elsewhere(config: Config, located: LocalPaths, weights: bool) -> str | None:
    """Why the weights are not looked at: they are not there, and need not be. None where they are to be looked at."""
    start, on_hub = located.folder(config.model.hf_path), located.model(config.model.hf_path)
    if on_hub and on_hub.missing:
        return f"the weights of {config.model.hf_path} stay on the hub: that they fit config.json was not looked at"
    if weights or is_converted(start) or SafetensorsFolder.is_there(start):
        return None
    return f"{start} holds no weights: that they fit config.json was not looked at"


def answer_violations(config: Config, prompt_file: LoadedPrompts) -> list[str]:
    """Say which prompts lack the gold answer that the objective's reward compares with."""
    without = [prompt.id for prompt in prompt_file.prompts if prompt.answer is None]
    if config.objective.text_reward != "gold" or not without:
        return []
    return [
        f"{', '.join(config.prompts.paths)}: {len(without)} of {len(prompt_file.prompts)} prompts have no gold answer "
        f"(id {without[0]!r} first), which the gold reward of objective.preset={config.objective.preset} compares "
        "with; add answers or leave those prompts out"
    ]


def folder_violations(config: Config, start: Path, resume_from: Path | None) -> list[str]:
    """Why the run's export may not be written, its reference scores not be kept, or its buffer not be filled."""
    buffer = buffer_violations(config, first_step_of(resume_from))
    return _export_violations(config, start) + kept_scores_violations(config) + buffer


def _export_violations(config: Config, start: Path) -> list[str]:
    """Why RUN/hf_export may not be written when the run ends."""
    run = Path(config.run.output_dir)
    if not config.run.export or (run.exists() and not run.is_dir()):
        return []
    return export_target(run / EXPORT_NAME, label="run.export=true:").refusals(
        apart_from=(start, run / CHECKPOINTS_NAME), not_over=(run,)
    )


def first_step_of(resume_from: Path | None) -> int:
    """The number of steps that a checkpoint is behind; 0 without one."""
    return int(resume_from.name.removeprefix("step_")) if resume_from else 0


def check_replay(config: Config, replay: str, architecture: Architecture, resume_from: Path | None) -> Path:
    """The folder of saved rollouts. Raises UserError unless it holds every step still to do, as this run wants."""
    rollout, folder = config.rollout, find_rollouts(replay)
    first = first_step_of(resume_from)
    wanted = ReplayRequirements(
        num_prompts=rollout.prompts_per_step,
        responses_per_prompt=rollout.responses_per_prompt,
        vocab_size=architecture.vocab_size,
        temperature=rollout.temperature,
        longest_prompt=rollout.max_prompt_tokens,
        longest_response=rollout.max_response_tokens,
    )
    if violations := replay_violations(folder, range(first, config.run.num_steps), wanted):
        raise UserError(violations)
    return folder
