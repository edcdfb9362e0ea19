"""What does `powerflow check` say of a run that is possible?"""

from __future__ import annotations

from megatron_powerflow.config import Config
from megatron_powerflow.hf.size import num_parameters
from megatron_powerflow.model.precision import FP8_RECIPES
from megatron_powerflow.model.recompute import recompute_lines
from megatron_powerflow.parallel.batching import batching_line
from megatron_powerflow.parallel.layout import Layout
from megatron_powerflow.serving.checks import server_lines
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.reference_base import kept_scores_lines
from megatron_powerflow.training.resources import saving_line
from megatron_powerflow.training.staleness import temperature_lines, weight_lines


def describe(plan: Plan) -> str:
    """The layout and the sizes of a run, for `powerflow check`."""
    config, architecture = plan.config, plan.architecture
    rollouts = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    large = "its large files are compared with their digests when training starts"
    resumes = f"continues {plan.resume_from.name}; {large}" if plan.resume_from else "starts anew"
    mixture = architecture.experts
    experts = f" ({mixture.per_token} of {mixture.num} experts a token)" if mixture else ""
    dropped = f", {plan.num_prompts_too_long} too long and dropped" if plan.num_prompts_too_long else ""
    return "\n".join(
        [
            f"model     {architecture.family}, {architecture.num_layers} layers, hidden {architecture.hidden_size}, "
            f"{num_parameters(architecture) / 1e6:,.1f} M parameters{experts}, {config.precision.dtype}",
            f"prompts   {len(plan.prompts)} from {', '.join(config.prompts.paths)}{dropped}",
            *(f"hub       {name} at commit {revision}" for name, revision in plan.located.revisions.items()),
            f"step      {config.rollout.prompts_per_step} prompts x {config.rollout.responses_per_prompt} responses = "
            f"{rollouts} rollouts, {config.optimizer.updates_per_rollout} update(s)",
            f"objective {config.objective.preset}, alpha {config.objective.alpha}, log Z' {config.objective.log_z}",
            *([f"replays   {plan.replay_from}, no engine"] if plan.replay_from else []),
            *server_lines(config, num_parameters(architecture)),
            *weight_lines(config, plan.sampled_by),
            *kept_scores_lines(config, architecture, plan.inputs.digests.get("weights")),
            *_fp8_lines(config, plan.layout),
            *temperature_lines(config),
            batching_line(config, plan.layout),
            *recompute_lines(config.model, architecture),
            f"run       {config.run.num_steps} steps into {config.run.output_dir} ({resumes}), "
            f"{config.run.num_steps * config.rollout.prompts_per_step / len(plan.prompts):.2g} epochs of the prompts",
            saving_line(config, num_parameters(architecture), plan.layout.world_size),
            f"layout    {plan.layout.describe()}",
            plan.layout.picture(),
            *(f"notice    {notice}" for notice in plan.notices),
        ]
    )


def _fp8_lines(config: Config, layout: Layout) -> list[str]:
    if config.precision.dtype != "fp8":
        return []
    recipe = FP8_RECIPES[config.precision.fp8_recipe or ""]
    capability, engine, cuda = (".".join(map(str, version)) for version in recipe[1:])
    multiple = layout.token_multiple(config.precision)
    return [
        f"fp8       {config.precision.fp8_recipe}: the tokens of a rank's forward pass are padded to a multiple of "
        f"{multiple}; that each GPU has compute capability {capability}, and that Transformer Engine {engine} and a "
        f"torch for CUDA {cuda} or newer are installed, is looked at when training starts, not here"
    ]
