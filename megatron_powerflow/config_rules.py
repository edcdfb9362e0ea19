"""Which keys of a config depend on which? Defaults that hang on another key, keys that then have no effect, values
that contradict each other.

Left out: the keys themselves (`config.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megatron_powerflow.objective.presets import Balance, EntropyMinimum, PolicyGradient

if TYPE_CHECKING:
    from megatron_powerflow.config import Config


SLOWEST_LOG_Z_LR = 0.01
SMALLEST_EPS = 1e-20  # the square of a gradient below 1e-22 is 0 in fp32, and Adam divides by eps alone


def _has_alpha(c: Config) -> bool:
    form = c.objective.form
    return isinstance(form, Balance) or (isinstance(form, PolicyGradient) and form.powers)


def _powers(c: Config) -> bool:
    """The target is p_base^alpha, tilted or not; a policy can be asked how far it has come."""
    return _has_alpha(c) and c.objective.preset != "tb_token_target"


def _balances(c: Config) -> bool:
    return isinstance(c.objective.form, Balance)


def _tilts(c: Config) -> bool:
    return isinstance(c.objective.form, Balance) and c.objective.form.tilts


def _rewarded(c: Config) -> bool:
    return c.objective.task_reward not in (None, "none")


def _has_engine(c: Config) -> bool:
    return c.rollout.replay is None


def _has_servers(c: Config) -> bool:
    return _has_engine(c) and c.rollout.engine == "vllm"


def _starts_servers(c: Config) -> bool:
    return _has_servers(c) and c.rollout.vllm.start is not None


def _has_weights_folder(c: Config) -> bool:
    return _has_servers(c) and c.rollout.vllm.transport != "stream"


def _served_dtype(c: Config) -> str:
    return "float32" if c.precision.dtype == "fp32" else "bfloat16"


def _ratio(c: Config) -> str:
    """w of Eq. 10 is 1 where the policy that trains has sampled, and is not left out where another one has.

    A balance takes the whole sequence's ratio, which is Eq. 10's: over long responses it stands at a side of the clip,
    which still says the direction, where the mean over tokens would be 1 in all but name. A surrogate has no gradient
    outside of its clip and takes each token's (GRPO, arXiv 2402.03300). one_shot_em has nothing to weigh. With
    objective.sampler_ratio the old policy is the trainer at the start of the step, whoever sampled.
    """
    starts_as_old = _has_engine(c) or _weighs_sampler(c)
    if isinstance(c.objective.form, EntropyMinimum) or (c.optimizer.updates_per_rollout == 1 and starts_as_old):
        return "none"
    return "seq" if _balances(c) else "token"


def _weighs_sampler(c: Config) -> bool:
    return c.objective.sampler_ratio != "none"


def _pads(c: Config) -> bool:  # or may
    return c.parallel.max_tokens_per_micro_batch is None


def _estimate(c: Config) -> str:
    return "mlp" if c.rollout.responses_per_prompt == 1 else "group"


def _for_flow_rl(value: Any, otherwise: Any) -> Callable[[Config], Any]:
    return lambda c: value if c.objective.preset == "flow_rl" else otherwise


NO_SERVERS = "rollout.engine is not vllm, or rollout.replay trains without an engine"
NO_FOLDER = "rollout.vllm.transport=stream, or " + NO_SERVERS
NOT_STARTED = "rollout.vllm.start is not given: no server is started"


# Keys whose default depends on another key: (key, its default or a function that gives it, when it applies, why not).
# Where a key does not apply it stays None, and setting it is an error: nothing is accepted and ignored. In this order.
_Conditional = tuple[str, Any, "Callable[[Config], bool]", str]
CONDITIONAL: tuple[_Conditional, ...] = (
    ("objective.alpha", _for_flow_rl(1.0, 4.0), _has_alpha, "this objective.preset knows no alpha"),
    ("objective.alpha_warmup_steps", 0, _has_alpha, "this objective.preset knows no alpha"),
    ("objective.psi", 0.0, _has_alpha, "this objective.preset knows no energy"),
    ("objective.psi_exempt_tasks", ["creative"], lambda c: bool(c.objective.psi), "objective.psi=0"),
    ("objective.log_z", _estimate, _balances, "this objective.preset has no log Z'"),
    ("objective.log_z_detach", True, lambda c: c.objective.log_z == "mlp", "objective.log_z is not mlp"),
    ("objective.tilt_cap", None, _tilts, "this objective.preset has no tilt on length that could be capped"),
    ("objective.task_reward", _for_flow_rl("gold", "none"), _balances, "this objective.preset has no energy to add to"),
    ("objective.reward_scale", _for_flow_rl(15.0, 1.0), _rewarded, "objective.task_reward=none"),
    ("objective.reward_advantage", _for_flow_rl(True, False), _rewarded, "objective.task_reward=none"),
    ("objective.kl_coefficient", 0.0, lambda c: not _has_alpha(c), "this objective.preset has p_base in its target"),
    ("objective.ratio", _ratio, lambda c: True, ""),
    ("objective.clip", "two_sided", lambda c: c.objective.ratio != "none", "objective.ratio=none"),
    ("objective.clip_epsilon", 0.2, lambda c: c.objective.ratio != "none", "objective.ratio=none"),
    ("objective.sampler_ratio_cap", 2.0, _weighs_sampler, "objective.sampler_ratio=none"),
    ("optimizer.log_z_lr", 0.5, lambda c: c.objective.learns_log_z, "objective.log_z is not learned"),
    ("optimizer.min_lr", 0.0, lambda c: c.optimizer.lr_decay != "constant", "optimizer.lr_decay=constant"),
    ("model.recompute_modules", None, lambda c: c.model.recompute == "selective", "model.recompute is not selective"),
    ("precision.fp8_recipe", "tensorwise", lambda c: c.precision.dtype == "fp8", "precision.dtype is not fp8"),
    ("precision.fp8_format", "hybrid", lambda c: c.precision.dtype == "fp8", "precision.dtype is not fp8"),
    ("parallel.micro_batch_size", None, _pads, "parallel.max_tokens_per_micro_batch packs instead"),
    ("parallel.vpp", None, lambda c: c.parallel.pp > 1, "parallel.pp=1"),
    ("checkpoint.keep_every", None, lambda c: c.checkpoint.keep is not None, "checkpoint.keep is not given: all stay"),
    ("evaluation.samples", 3, _has_engine, "rollout.replay trains without an engine"),
    ("evaluation.sample_tokens", 512, _has_engine, "rollout.replay trains without an engine"),
    ("evaluation.prompts", None, _has_engine, "rollout.replay trains without an engine"),
    ("evaluation.num_prompts", None, lambda c: c.evaluation.prompts is not None, "evaluation.prompts is not given"),
    ("evaluation.num_responses", 4, lambda c: c.evaluation.prompts is not None, "evaluation.prompts is not given"),
    ("rollout.vllm.urls", None, _has_servers, NO_SERVERS),
    ("rollout.vllm.start", None, _has_servers, NO_SERVERS),
    ("rollout.vllm.transport", "folder", _has_servers, NO_SERVERS),
    ("rollout.vllm.weights", None, _has_weights_folder, NO_FOLDER),
    ("rollout.vllm.max_requests", 16, _has_servers, NO_SERVERS),
    ("rollout.vllm.answer_seconds", 1800.0, _has_servers, NO_SERVERS),
    ("rollout.vllm.wait_seconds", 900.0, _has_servers, NO_SERVERS),
    ("rollout.vllm.sleeps", False, _starts_servers, NOT_STARTED),
    ("rollout.vllm.tp", 1, _starts_servers, NOT_STARTED),
    ("rollout.vllm.dtype", _served_dtype, _starts_servers, NOT_STARTED),
    ("rollout.vllm.memory", lambda c: 0.4 if c.rollout.vllm.sleeps else 0.9, _starts_servers, NOT_STARTED),
    ("rollout.vllm.port", 8200, _starts_servers, NOT_STARTED),
    ("rollout.vllm.python", None, _starts_servers, NOT_STARTED),
    ("rollout.vllm.arguments", None, _starts_servers, NOT_STARTED),
    ("run.stop_at_alpha", None, _powers, "the target of this objective.preset is no power of the base model"),
    ("metrics.wandb_project", "megatron_powerflow", lambda c: c.metrics.wandb != "off", "metrics.wandb=off"),
)


def contradictions(config: Config) -> list[str]:
    """What is wrong with values that are each right by themselves: a sentence each."""
    rollout, objective, optimizer = config.rollout, config.objective, config.optimizer
    violations = _buffer(config)
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        violations.append("parallel.sequence_parallel=true has no effect because parallel.tp=1; remove it")
    if rollout.save and rollout.replay is not None:
        violations.append("rollout.save=true has no effect because rollout.replay is given; remove it")
    violations += _about_servers(config)
    by_group = objective.log_z or f"the advantage of objective.preset={objective.preset}"
    alone = objective.learns_log_z or isinstance(objective.form, EntropyMinimum)
    if not alone and rollout.responses_per_prompt == 1:
        violations.append(
            f"rollout.responses_per_prompt=1 with {by_group}: it is a mean over the group and needs at least 2 "
            "responses; raise it" + (" or choose objective.log_z=mlp" if objective.log_z else "")
        )
    violations += _weights_without_terms(config)
    if rollout.prompts_per_step % optimizer.updates_per_rollout:
        violations.append(
            f"optimizer.updates_per_rollout={optimizer.updates_per_rollout} does not divide "
            f"rollout.prompts_per_step={rollout.prompts_per_step}: each update takes whole groups"
        )
    interval, keep_every = config.checkpoint.interval, config.checkpoint.keep_every
    if keep_every is not None and (interval == 0 or keep_every % interval):
        violations.append(
            f"checkpoint.keep_every={keep_every} is no multiple of checkpoint.interval={interval}; choose one that is"
        )
    violations += _alpha_out_of_reach(config)
    asked, steps = config.run.stop_on_alarm, config.alarm.nothing_kept_steps
    if isinstance(asked, list) and "nothing_kept" in asked and steps >= optimizer.max_skipped_steps:
        violations.append(
            f"run.stop_on_alarm=[nothing_kept] with alarm.nothing_kept_steps={steps}: "
            f"optimizer.max_skipped_steps={optimizer.max_skipped_steps} fails the run first; make it larger"
        )
    if optimizer.min_lr is not None and optimizer.min_lr > optimizer.lr:
        violations.append(f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}")
    if optimizer.eps < SMALLEST_EPS:
        violations.append(
            f"optimizer.eps={optimizer.eps:g}: where a gradient is so small that its square is 0 in fp32, Adam divides "
            f"by eps alone, and the weight is NaN or infinite; choose {SMALLEST_EPS:g} or more (1e-8 is the default)"
        )
    if optimizer.lr * optimizer.weight_decay >= 1:
        violations.append(
            f"optimizer.weight_decay={optimizer.weight_decay:g} with optimizer.lr={optimizer.lr:g}: each update "
            "multiplies the weights by 1 - lr * weight_decay, which must be above 0; lower one of them"
        )
    if optimizer.log_z_lr is not None and 0 < optimizer.log_z_lr < SLOWEST_LOG_Z_LR:
        violations.append(
            f"optimizer.log_z_lr={optimizer.log_z_lr}: it is the share of the mean residual that an update takes out "
            f"of log Z' (in earlier versions Adam's rate, 1e-3); below {SLOWEST_LOG_Z_LR} log Z' is a hundred updates "
            "behind the policy; 0.5 is the default, 0 keeps the start value"
        )
    if any(not 0 <= beta < 1 for beta in optimizer.betas):
        violations.append(f"optimizer.betas={optimizer.betas}: each must be in [0, 1)")
    return violations


def _about_servers(config: Config) -> list[str]:
    """What is wrong with the servers that sample, and with sampling ahead."""
    rollout, servers = config.rollout, config.rollout.vllm
    if not _has_servers(config):
        why = "rollout.engine is not vllm: the live weights cannot sample and train at a time"
        if rollout.replay is not None:
            why = "rollout.replay trains without an engine"
        given = [f"rollout.{key}" for key in ("steps_ahead", "in_flight_updates") if getattr(rollout, key)]
        given += ["rollout.engine=vllm"] if rollout.engine == "vllm" else []
        return [f"{key} has no effect because {why}; remove it" for key in given]
    violations = []
    if (servers.urls is None) == (servers.start is None):
        both = "both are given" if servers.urls else "neither is given"
        violations.append(f"rollout.engine=vllm: either rollout.vllm.urls or rollout.vllm.start is needed; {both}")
    if rollout.in_flight_updates and not rollout.steps_ahead:
        violations.append(
            "rollout.in_flight_updates=true has no effect because rollout.steps_ahead=0: nothing is under way when the "
            "weights change; remove it"
        )
    if servers.sleeps and rollout.steps_ahead:
        violations.append(
            f"rollout.vllm.sleeps=true with rollout.steps_ahead={rollout.steps_ahead}: a server that sleeps while this "
            "one trains answers nothing; remove one of them"
        )
    if servers.sleeps and servers.transport == "stream":
        violations.append(
            "rollout.vllm.transport=stream with rollout.vllm.sleeps=true: a process group takes each GPU once, and the "
            "servers have those of the trainer; use rollout.vllm.transport=folder, with rollout.vllm.weights in memory "
            "of the machine, such as /dev/shm/weights"
        )
    return violations


def _weights_without_terms(config: Config) -> list[str]:
    """Why the terms of the loss cannot be weighted as objective.ratio and objective.sampler_ratio say."""
    objective, violations = config.objective, []
    for name, ratio in (("ratio", objective.ratio), ("sampler_ratio", objective.sampler_ratio)):
        if ratio == "token" and isinstance(objective.form, Balance):
            violations.append(
                f"objective.{name}=token with objective.preset={objective.preset}: a residual belongs to a whole "
                "response; must be one of 'none', 'seq', 'seq_mean'"
            )
        if ratio != "none" and isinstance(objective.form, EntropyMinimum):
            violations.append(f"objective.{name}={ratio} with one_shot_em: it has no reward to weigh; remove it")
    of_response = isinstance(objective.form, PolicyGradient) and objective.ratio in ("seq", "seq_mean")
    if objective.sampler_ratio == "token" and of_response:
        violations.append(
            f"objective.sampler_ratio=token with objective.ratio={objective.ratio}: a surrogate of whole responses has "
            "no terms of tokens; set objective.ratio=token, or objective.sampler_ratio to 'seq' or 'seq_mean'"
        )
    return violations


def _buffer(config: Config) -> list[str]:
    """Why a step cannot train on the rollouts of the steps before."""
    rollout, violations = config.rollout, list[str]()
    if not rollout.buffer_steps:
        return violations
    asked = f"rollout.buffer_steps={rollout.buffer_steps}"
    if rollout.replay is not None:
        violations.append(f"{asked} with rollout.replay: a replay takes each step's rollouts alone; remove one of them")
    elif not rollout.save:
        violations.append(
            f"{asked} with rollout.save=false: a run that goes on reads the last steps' rollouts from its folder; set "
            "rollout.save=true"
        )
    if not isinstance(config.objective.form, Balance):
        violations.append(
            f"{asked} with objective.preset={config.objective.preset}: its gradient is a mean over responses of the "
            "policy as it is, and older ones would bias it; remove the key or choose a trajectory balance"
        )
    return violations


def _alpha_out_of_reach(config: Config) -> list[str]:
    """Why run.stop_at_alpha would never end the run."""
    stop_at, alpha = config.run.stop_at_alpha, config.objective.alpha
    violations: list[str] = []
    if stop_at is None or alpha is None:
        return violations
    if not (1 < stop_at <= alpha or alpha <= stop_at < 1):
        between = f"above 1, up to {alpha:g}" if alpha > 1 else f"from {alpha:g}, below 1"
        violations.append(
            f"run.stop_at_alpha={stop_at:g} with objective.alpha={alpha:g}: training goes from 1 to objective.alpha; "
            + ("there is nothing to reach; remove it" if alpha == 1 else f"choose a value {between}")
        )
    if config.rollout.responses_per_prompt < 3:
        violations.append(
            f"run.stop_at_alpha={stop_at:g} with rollout.responses_per_prompt={config.rollout.responses_per_prompt}: "
            "the power that a prompt's responses show takes at least 3 of them; raise it"
        )
    return violations
