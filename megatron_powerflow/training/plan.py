"""Can this run work at all? Everything that can be known without a GPU or a second process, all at once.

`powerflow check` prints the answer; `powerflow train` asks the same question on every rank before any process
group exists. What passes is a `Plan`: the config together with what the files say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import TypeVar

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.checkpoint.first_files import CONFIG_MARK
from megatron_powerflow.checkpoint.folder import (
    CHECKPOINTS_NAME,
    CONFIG_NAME,
    EXPORT_NAME,
    hf_folder_of,
    is_converted,
)
from megatron_powerflow.config import Config, ObjectiveSection
from megatron_powerflow.config_file import dump_config
from megatron_powerflow.data.prompt_format import PromptFormat
from megatron_powerflow.data.prompts import LoadedPrompts, load_prompts
from megatron_powerflow.data.tokenizer import ConversationSettings, Tokenizer, load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.checked import open_checked
from megatron_powerflow.hf.config import read_architecture, read_stop_token_ids
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.files import SafetensorsFolder
from megatron_powerflow.hf.ordinary_files import require_ordinary_files
from megatron_powerflow.hub.located import NO_DOWNLOADS, LocalPaths
from megatron_powerflow.model.precision import FP8_RECIPES, fp8_model_violations
from megatron_powerflow.model.recompute import recompute_lines, recompute_violations
from megatron_powerflow.parallel.batching import batching_line
from megatron_powerflow.parallel.launch import environment_secrets
from megatron_powerflow.parallel.layout import Layout, plan_layout
from megatron_powerflow.records import Prompt
from megatron_powerflow.redaction import holds_secret
from megatron_powerflow.rollout.rollout_files import ReplayRequirements, find_rollouts, replay_violations
from megatron_powerflow.serving.checks import server_lines, server_violations
from megatron_powerflow.targets import export_target
from megatron_powerflow.training.inputs import Inputs, changes, file_digest, model_digests, prompt_digest, read_inputs
from megatron_powerflow.training.reference_base import kept_scores_lines, kept_scores_violations
from megatron_powerflow.training.resources import buffer_violations, resource_violations, saving_line
from megatron_powerflow.training.resume import Change, Resume, find_resume
from megatron_powerflow.training.staleness import (
    SampledBy,
    is_own_run,
    objective_of,
    temperature_lines,
    weight_lines,
    who_sampled,
)
from megatron_powerflow.whole_files import write_file

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """A run that has been found possible.

    resume: the checkpoint it continues, if any, and how; overridden: keys that may have changed all the same;
    replay_from: the folder of step files it trains on instead of sampling, or None; located: where the config's names
    on the hub are; sampled_by: whose weights drew a step's rollouts, OWN also where they are replayed from a run of
    this very config. notices: what a user should know before it starts.
    """

    config: Config
    layout: Layout
    architecture: Architecture
    family: Family
    tokenizer: Tokenizer
    stop_token_ids: frozenset[int]
    prompts: tuple[Prompt, ...]
    num_prompts_too_long: int
    evaluation_prompts: tuple[Prompt, ...]
    resume: Resume
    replay_from: Path | None
    inputs: Inputs
    located: LocalPaths = NO_DOWNLOADS
    sampled_by: SampledBy = SampledBy.OWN
    notices: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint that the run continues, if any."""
        return self.resume.checkpoint

    @property
    def objective(self) -> ObjectiveSection:
        """As it is trained: see `staleness.objective_of`."""
        return objective_of(self.config, self.sampled_by)

    @property
    def serves(self) -> bool:
        """Whether vLLM servers sample."""
        return self.config.rollout.engine == "vllm" and self.replay_from is None

    @property
    def run_folder(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def model_folder(self) -> Path:
        """model.hf_path on this disk."""
        return self.located.folder(self.config.model.hf_path)

    @property
    def hf_folder(self) -> Path:
        return hf_folder_of(self.model_folder)

    def share_of(self, prompts: Sequence[T], dp_rank: int) -> list[tuple[int, T]]:
        """(slot, prompt) pairs of one data-parallel rank: equal, contiguous shares of the step's prompts, cut so
        that each of the step's updates takes an equal share of every rank."""
        per_update = len(prompts) // self.config.optimizer.updates_per_rollout
        per_rank = per_update // self.layout.dp
        return [(slot, prompt) for slot, prompt in enumerate(prompts) if slot % per_update // per_rank == dp_rank]


def make_plan(
    config: Config,
    world_size: int,
    *,
    weights: bool = True,
    located: LocalPaths = NO_DOWNLOADS,
    overridden: Sequence[str] = (),
) -> Plan:
    """Raises UserError with every violation that can be found, not just the first.

    weights: False where the model's folder may be one without weights, as on a login node: then a notice says what was
    not looked at. located: what `fetch_inputs` found. overridden: keys that may differ although the run goes on.
    """
    violations, notices = _secret_violations(config) + server_violations(config), list[str]()
    hf_folder = hf_folder_of(start := located.folder(config.model.hf_path))
    require_ordinary_files(Path(hf_folder))  # before anything of it is read
    model = _collect(violations, lambda: read_architecture(hf_folder, FAMILIES))
    resume = _collect(violations, lambda: find_resume(config, overridden)) or Resume()
    config, resume_from = resume.batched_as_before(config), resume.checkpoint
    before = _collect(violations, lambda: read_inputs(resume_from)) if resume_from else None
    today = date.fromisoformat(before.today) if before else date.today()
    load = partial(load_tokenizer, hf_folder)
    is_there = Path(hf_folder).is_dir()  # else that was said
    tokenizer = _collect(violations, lambda: load(conversation_of(config, today))) if is_there else None
    size = num_parameters(model[0]) if model else None
    violations += _folder_violations(config, start, resume_from) + resource_violations(config, size)
    layout = stop_token_ids = prompt_file = evaluation_file = replay_from = None
    if model is not None:
        architecture, family = model
        layout = _collect(violations, lambda: plan_layout(config, architecture, world_size))
        notices += _collect(violations, lambda: _look_at_weights(config, located, weights, architecture, family)) or []
        violations += model_violations(config, architecture)
        if (replay := config.rollout.replay) is not None:
            replay_from = _collect(violations, lambda: check_replay(config, replay, architecture, resume_from))
    if model is not None and tokenizer is not None:
        stop_token_ids = _collect(violations, lambda: stop_token_ids_of(config, hf_folder, tokenizer, model[0]))
        read = partial(_read_prompts, config, located, tokenizer, model[0])
        prompt_file, evaluation_file = _prompt_files(violations, config, read)
    if violations:
        raise UserError(violations)
    assert model and layout and tokenizer is not None and stop_token_ids and prompt_file
    inputs = _inputs_of(config, located, today, prompt_file, evaluation_file, replay_from)
    return Plan(
        inputs=inputs,
        config=config,
        layout=layout,
        architecture=model[0],
        family=model[1],
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        prompts=prompt_file.prompts,
        num_prompts_too_long=prompt_file.num_too_long,
        evaluation_prompts=evaluation_file.prompts[: config.evaluation.num_prompts] if evaluation_file else (),
        resume=_with_changed_content(resume, before, inputs, overridden),
        replay_from=replay_from,
        located=located,
        sampled_by=_who_sampled(config, located, replay_from),
        notices=(*notices, *tokenizer.notices, *resume.notices),
        overridden=tuple(overridden),
    )


def _who_sampled(config: Config, located: LocalPaths, replay_from: Path | None) -> SampledBy:
    own = replay_from is None or is_own_run(config, replay_from, revisions=located.revisions)
    return who_sampled(config, own=own)


def _prompt_files(
    violations: list[str], config: Config, read: Callable[[Sequence[str]], LoadedPrompts]
) -> tuple[LoadedPrompts | None, LoadedPrompts | None]:
    """Read the prompts and the held-out prompts, and note what is wrong with them."""
    prompt_file = _collect(violations, lambda: read(config.prompts.paths))
    if prompt_file is not None:
        violations += _answer_violations(config, prompt_file)
    path = config.evaluation.prompts
    return prompt_file, _collect(violations, lambda: read([path])) if path else None


def _with_changed_content(resume: Resume, before: Inputs | None, now: Inputs, overridden: Sequence[str]) -> Resume:
    """Add what has another content than when the run began. Raises UserError for what of it is not overridden."""
    changed = changes(before, now) if before else []
    if refused := [change.text for change in changed if change.key not in overridden]:
        raise UserError(refused)
    by_content = [Change(change.key, change.before, change.now) for change in changed]
    return replace(resume, changed=(*resume.changed, *by_content))


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


def num_parameters(architecture: Architecture) -> int:
    """Parameters of the whole model, tied embeddings once."""
    from megatron_powerflow.hf.shapes import expected_tensors

    total = 0
    for shape in expected_tensors(architecture, FAMILIES[architecture.family]).values():
        size = 1
        for extent in shape:
            size *= extent
        total += size
    return total


def _collect(violations: list[str], function: Callable[[], T]) -> T | None:
    """The function's value; or None, and its violations noted."""
    try:
        return function()
    except UserError as error:
        violations += error.violations
        return None


def _inputs_of(
    config: Config,
    located: LocalPaths,
    today: date,
    prompts: LoadedPrompts,
    evaluation: LoadedPrompts | None,
    replay_from: Path | None,
) -> Inputs:
    start, on_hub = located.folder(config.model.hf_path), located.model(config.model.hf_path)
    digests = model_digests(hf_folder_of(start), start) | {"prompts": prompt_digest(prompts.prompts)}
    if on_hub and on_hub.missing:
        digests.pop("weights", None)  # of the files that are there already
    if evaluation is not None:
        digests["evaluation"] = prompt_digest(evaluation.prompts)
    paths = {
        "weights": config.model.hf_path,
        "tokenizer": config.model.hf_path,
        "prompts": ", ".join(config.prompts.paths),
        "evaluation": config.evaluation.prompts or "",
    }
    replay = {path.name: file_digest(path) for path in sorted(replay_from.glob("step_*.jsonl"))} if replay_from else {}
    return Inputs(today.isoformat(), digests, paths, replay, revisions=located.revisions)


def conversation_of(config: Config, today: date) -> ConversationSettings:
    """How this run writes a conversation. Raises UserError where its template cannot be read."""
    section = config.prompts
    template = None
    if section.chat_template is not None:
        try:
            if not Path(section.chat_template).is_file():
                raise OSError("no such file, or no ordinary one")
            template = Path(section.chat_template).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts.chat_template={section.chat_template!r}: cannot be read: {error}") from None
    return ConversationSettings(template, dict(section.template_arguments or {}), today)


def stop_token_ids_of(
    config: Config, hf_folder: Path, tokenizer: Tokenizer, architecture: Architecture
) -> frozenset[int]:
    """rollout.stop_token_ids, or what the model's folder names. Raises UserError where one is not of the vocabulary."""
    chosen, size = config.rollout.stop_token_ids, architecture.vocab_size
    if chosen is None:
        return read_stop_token_ids(hf_folder, tokenizer.eos_token_id, size)
    if outside := [token for token in chosen if token >= size]:
        raise UserError(f"rollout.stop_token_ids holds {outside[0]}, outside the model's vocabulary of {size}")
    return frozenset(chosen)


def _weights_elsewhere(config: Config, located: LocalPaths, weights: bool) -> str | None:
    """Why the weights are not looked at: they are not there, and need not be. None where they are to be looked at."""
    start, on_hub = located.folder(config.model.hf_path), located.model(config.model.hf_path)
    if on_hub and on_hub.missing:
        return f"the weights of {config.model.hf_path} stay on the hub: that they fit config.json was not looked at"
    if weights or is_converted(start) or SafetensorsFolder.is_there(start):
        return None
    return f"{start} holds no weights: that they fit config.json was not looked at"


def _look_at_weights(
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


def _answer_violations(config: Config, prompt_file: LoadedPrompts) -> list[str]:
    without = [prompt.id for prompt in prompt_file.prompts if prompt.answer is None]
    if config.objective.text_reward != "gold" or not without:
        return []
    return [
        f"{', '.join(config.prompts.paths)}: {len(without)} of {len(prompt_file.prompts)} prompts have no gold answer "
        f"(id {without[0]!r} first), which the gold reward of objective.preset={config.objective.preset} compares "
        "with; add answers or leave those prompts out"
    ]


def _read_prompts(
    config: Config, located: LocalPaths, tokenizer: Tokenizer, architecture: Architecture, names: Sequence[str]
) -> LoadedPrompts:
    section = config.prompts
    return load_prompts(
        [path for name in names for path in located.files(name)],
        tokenizer,
        form=PromptFormat(section.written, section.system, section.suffix),
        tasks=section.tasks,
        require_answer=section.require_answer,
        vocab_size=architecture.vocab_size,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        too_long=config.prompts.too_long,
    )


def _secret_violations(config: Config) -> list[str]:
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


def _folder_violations(config: Config, start: Path, resume_from: Path | None) -> list[str]:
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


def write_config(plan: Plan) -> None:
    """The resolved config into the run's folder, which is there and held."""
    write_file(plan.run_folder / CONFIG_NAME, CONFIG_MARK + dump_config(plan.config))
