"""Can this run work at all? Everything that can be known without a GPU or a second process, all at once.

`powerflow check` prints the answer; `powerflow train` asks the same question on every rank before any process
group exists. What passes is a `Plan`: the config together with what the files say.

Left out: the single checks (`plan_checks.py`, `resources.py`), what `check` prints of a plan (`plan_lines.py`).
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
from megatron_powerflow.checkpoint.folder import CONFIG_NAME, hf_folder_of
from megatron_powerflow.config import Config, ObjectiveSection
from megatron_powerflow.config_file import dump_config
from megatron_powerflow.data.prompt_format import PromptFormat
from megatron_powerflow.data.prompts import LoadedPrompts, load_prompts
from megatron_powerflow.data.tokenizer import ConversationSettings, Tokenizer, load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_architecture, read_stop_token_ids
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.ordinary_files import require_ordinary_files
from megatron_powerflow.hf.size import num_parameters
from megatron_powerflow.hub.located import NO_DOWNLOADS, LocalPaths
from megatron_powerflow.parallel.layout import Layout, plan_layout
from megatron_powerflow.records import Prompt
from megatron_powerflow.serving.checks import server_violations
from megatron_powerflow.training.inputs import Inputs, changes, file_digest, model_digests, prompt_digest, read_inputs
from megatron_powerflow.training.plan_checks import (
    answer_violations,
    check_replay,
    folder_violations,
    look_at_weights,
    model_violations,
    secret_violations,
)
from megatron_powerflow.training.resources import resource_violations
from megatron_powerflow.training.resume import Change, Resume, find_resume
from megatron_powerflow.training.staleness import SampledBy, is_own_run, objective_of, who_sampled
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
    violations, notices = secret_violations(config) + server_violations(config), list[str]()
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
    violations += folder_violations(config, start, resume_from) + resource_violations(config, size)
    layout = stop_token_ids = prompt_file = evaluation_file = replay_from = None
    if model is not None:
        architecture, family = model
        layout = _collect(violations, lambda: plan_layout(config, architecture, world_size))
        notices += _collect(violations, lambda: look_at_weights(config, located, weights, architecture, family)) or []
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
        violations += answer_violations(config, prompt_file)
    path = config.evaluation.prompts
    return prompt_file, _collect(violations, lambda: read([path])) if path else None


def _with_changed_content(resume: Resume, before: Inputs | None, now: Inputs, overridden: Sequence[str]) -> Resume:
    """Add what has another content than when the run began. Raises UserError for what of it is not overridden."""
    changed = changes(before, now) if before else []
    if refused := [change.text for change in changed if change.key not in overridden]:
        raise UserError(refused)
    by_content = [Change(change.key, change.before, change.now) for change in changed]
    return replace(resume, changed=(*resume.changed, *by_content))


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


def write_config(plan: Plan) -> None:
    """The resolved config into the run's folder, which is there and held."""
    write_file(plan.run_folder / CONFIG_NAME, CONFIG_MARK + dump_config(plan.config))
