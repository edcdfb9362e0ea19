"""What can a run be told? Every key, its type, its default, and what makes a value wrong.

YAML plus dotted overrides (`objective.alpha=2`), read by OmegaConf, checked by pydantic. An unknown key,
a wrong type and a key that would have no effect are errors; all of them are reported together.

Left out: which keys depend on which (`config_rules.py`); checks that need the model folder or the number of
processes (`parallel/layout.py`, `training/plan.py`). Imports no torch.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from megatron_powerflow.former_names import former_names_of
from megatron_powerflow.objective.presets import LEARNED_LOG_Z, PRESETS, Form, LogZ, PolicyGradient, PresetName, Ratio
from megatron_powerflow.time_limit import seconds_until_stop

if not TYPE_CHECKING:  # names of 0.1.0, until 0.3
    __getattr__ = former_names_of(__name__)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
SMALLEST, LARGEST = 1e-30, 1e30


def _held_by_fp32(value: float) -> float:
    """Beyond these sizes fp32, in which runs compute, has 0 or infinity for a number or soon for what is made of it."""
    if value and not SMALLEST <= abs(value) <= LARGEST:
        raise ValueError(f"a size between {SMALLEST:g} and {LARGEST:g}, which fp32 computes with, is needed")
    return value


PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_held_by_fp32)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_held_by_fp32)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, serialize_by_alias=True)


# names of Megatron's; model/recompute.py says what each is
RecomputedModule = Literal["mlp", "moe", "shared_experts", "moe_act", "layernorm", "core_attn", "mla_up_proj"]


class ModelSection(Section):
    hf_path: str = Field(
        description="what the run starts from: Hugging Face folder, converted checkpoint or OWNER/NAME[@REVISION] on "
        "the hub; also the frozen reference"
    )
    reference: Literal["resident", "swap"] = Field(
        "resident", description="second copy on the device, or one set of weights swapped with host memory"
    )
    reference_store: str | None = Field(
        None, description="folder, shared by runs, where the reference's log-probs are kept and found: none by default"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations computed again in the backward pass, to save memory: none, those of recompute_modules "
        "or all but the layers' inputs",
    )
    recompute_modules: Annotated[list[RecomputedModule], Field(min_length=1)] | None = Field(
        None,
        description="modules whose activations are computed again; default: the MLP or the mixture, and scores that "
        "are capped",
    )


class ParallelSection(Section):
    tp: PositiveInt = Field(1, description="tensor-parallel size")
    pp: PositiveInt = Field(1, description="pipeline-parallel size")
    vpp: PositiveInt | None = Field(None, description="model chunks per pipeline stage (interleaving)")
    layers_per_chunk: Annotated[list[PositiveInt], Field(min_length=1)] | None = Field(
        None,
        description="layers of each pipeline stage (with vpp: of each chunk, in model order); default: as even as can "
        "be, embedding and output layer counted as one each where they cannot be equal",
    )
    cp: PositiveInt = Field(1, description="context-parallel size")
    ep: PositiveInt = Field(1, description="expert-parallel size")
    sequence_parallel: bool = Field(False, description="split norms and dropout along the sequence over tp")
    max_tokens_per_micro_batch: PositiveInt | None = Field(
        None,
        description="a forward pass takes as many rollouts as fit, packed without padding (over cp together); default: "
        "four of the longest, in 2,048 to 16,384 tokens, and no less than one",
    )
    micro_batch_size: PositiveInt | None = Field(
        None, description="instead: so many rollouts per forward pass, padded to the longest of them"
    )


class PrecisionSection(Section):
    dtype: Literal["fp32", "bf16", "fp8"] = Field("bf16", description="of weights and activations")
    fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8"] | None = Field(
        None, description="Transformer Engine scaling; default tensorwise (stateless current scaling)"
    )
    fp8_format: Literal["hybrid", "e4m3"] | None = Field(None, description="default hybrid")


class PromptsSection(Section):
    path: str | list[str] = Field(
        description="JSONL, JSON, CSV or parquet, also .gz, here or on the hub (hf://OWNER/NAME/FILE); one or a list: "
        "prompt, messages, question, ... per row"
    )
    written: Literal["given", "chat", "text"] = Field(
        "given", alias="as", description="chat: texts become the user's message; text: its lone message becomes a text"
    )
    system: str | None = Field(None, description="first message of every conversation")
    suffix: str | None = Field(None, description="behind the last thing that the user says")
    chat_template: str | None = Field(None, description="file with a Jinja template, in place of the model's")
    template_arguments: dict[str, Any] | None = Field(
        None, description="variables of the chat template, such as {enable_thinking: false}"
    )
    tasks: list[str] | None = Field(None, description="only prompts of these tasks; default: all")
    require_answer: bool = Field(False, description="refuse prompts without a gold answer")
    shuffle: bool = Field(True, description="a new permutation each epoch, from run.seed")
    too_long: Literal["drop", "error"] = Field("drop", description="prompts over rollout.max_prompt_tokens")

    @field_validator("path", mode="before")
    @classmethod
    def names_files(cls, value: Any) -> Any:
        """Here, because the union's own errors speak of both its members."""
        if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is str for item in value)):
            return value
        raise ValueError("must be the name of a file, or a list of some")

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class VllmSection(Section):
    """Where a key says "default ..." it is None until the config is resolved, and stays None where it has no effect."""

    urls: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="servers that are there: http://host:port of each, in a private network"
    )
    start: PositiveInt | None = Field(
        None, description="instead: so many that `powerflow serve` starts in the same job, found by RUN/servers"
    )
    tp: PositiveInt | None = Field(None, description="tensor-parallel size of a server that is started; default 1")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of a server that is started; default: as precision.dtype, bfloat16 for fp8"
    )
    memory: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of a GPU (on CPUs: of all memory) that a server takes; default .9, and .4 where it sleeps",
    )
    sleeps: bool | None = Field(
        None, description="servers are on the trainer's GPUs, and sleep while it trains; default false"
    )
    port: Annotated[int, Field(ge=1024, le=65535)] | None = Field(
        None, description="of the first server that is started on a machine, the next of the next; default 8200"
    )
    python: str | None = Field(
        None, description="interpreter of the environment that has vLLM; default: that of `powerflow serve`"
    )
    arguments: list[str] | None = Field(None, description="more arguments of a server that is started")
    transport: Literal["folder", "changes", "stream"] | None = Field(
        None,
        description="how weights travel: all of them in a shared folder, only the bytes that changed, or from memory "
        "to memory over a process group",
    )
    weights: str | None = Field(None, description="that folder; default RUN/weights")
    max_requests: PositiveInt | None = Field(
        None, description="prompts that one server answers at a time for one replica; default 16"
    )
    answer_seconds: PositiveFloat | None = Field(
        None, description="without the answer to a prompt, before its server counts as hung; default 1800"
    )
    wait_seconds: Annotated[float, Field(gt=0, le=86400)] | None = Field(
        None, description="without any server, before the run is saved and ends with 75; default 900"
    )


class RolloutSection(Section):
    engine: Literal["megatron", "vllm"] = Field(
        "megatron", description="who samples: the live weights, in-process, or vLLM servers"
    )
    vllm: VllmSection = VllmSection()
    steps_ahead: NonNegativeInt = Field(
        0, description="steps whose responses are drawn while this one trains, by weights that are so much older"
    )
    in_flight_updates: bool = Field(
        False, description="servers get new weights in the middle of their responses, which then go on with them"
    )
    prompts_per_step: PositiveInt = Field(32, description="prompts of one step")
    responses_per_prompt: PositiveInt = Field(16, description="responses to each of them: a group")
    max_prompt_tokens: PositiveInt = Field(1024, description="longest prompt; see prompts.too_long")
    max_response_tokens: PositiveInt = Field(3072, description="a response that is longer is cut here")
    temperature: PositiveFloat = Field(1.0, description="of sampler and scorer alike")
    top_p: float = Field(1.0, description="only 1.0: truncated sampling does not train")
    top_k: int = Field(0, description="only 0: truncated sampling does not train")
    stop_token_ids: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = Field(
        None, description="tokens that end a response; default: all that the model's folder names"
    )
    max_concurrent_rows: PositiveInt = Field(256, description="responses decoded at a time on one rank")
    save: bool = Field(False, description="keep each step's rollouts in RUN/rollouts")
    buffer_steps: NonNegativeInt = Field(
        0, description="a step trains on the rollouts of the last so many steps, too; needs save"
    )
    replay: str | None = Field(None, description="train on the rollouts that another run saved; no engine")

    @field_validator("top_p", "top_k")
    @classmethod
    def untruncated(cls, value: float, info: Any) -> float:
        neutral = cls.model_fields[info.field_name].default
        if value not in (neutral, -1 if info.field_name == "top_k" else neutral):
            raise ValueError(
                f"only {neutral} trains: truncated sampling renormalises the log-probs, and the target "
                "alpha * log p_base is wrong under it; remove the key"
            )
        return neutral


class ObjectiveSection(Section):
    """Where a key says "default ..." it is None until the config is resolved, and stays None where it has no effect."""

    preset: PresetName = Field(
        "la_tb", description="which loss; objective/presets.py has each one's formula and source"
    )
    alpha: PositiveFloat | None = Field(
        None, description="power of the base model, default 4; > 1 sharpens, < 1 flattens"
    )
    alpha_warmup_steps: NonNegativeInt | None = Field(None, description="alpha rises from 1 over these; default 0")
    psi: Annotated[float, Field(le=0, allow_inf_nan=False), AfterValidator(_held_by_fp32)] | None = Field(
        None, description="added to the energy, per token, of a response without \\boxed{}; default 0, the paper: -0.5"
    )
    psi_exempt_tasks: list[str] | None = Field(None, description="tasks without psi; default [creative]")
    log_z: LogZ | None = Field(None, description="who says log Z'(q): a learned head (mlp), or the group's own mean")
    log_z_detach: bool | None = Field(None, description="head does not train the policy; default true")
    tilt_cap: PositiveInt | None = Field(
        None, description="lengths count up to this in the target's tilt exp(-lambda |y|); against repetition"
    )
    task_reward: Literal["none", "gold", "majority", "boxed"] | None = Field(
        None, description="added to the energy beside alpha log p_base; default none"
    )
    reward_scale: NonNegativeFloat | None = Field(None, description="beta, of task_reward; default 1")
    reward_advantage: bool | None = Field(None, description="task_reward centred and scaled in its group; default no")
    kl_coefficient: NonNegativeFloat | None = Field(None, description="of KL(policy || base) in rivals; default 0")
    ratio: Ratio | None = Field(
        None,
        description="importance weight w: none, of the sequence, of its token mean, per token; default none where the "
        "policy itself sampled, seq (rivals: token) with several updates or replayed rollouts",
    )
    clip: Literal["two_sided", "upper"] | None = Field(None, description="sides on which it is clipped; default both")
    clip_epsilon: PositiveFloat | None = Field(None, description="w is clipped to 1 +- this; default 0.2")
    sampler_ratio: Ratio = Field(
        "none",
        description="weight v of (trainer at the start of the step) / (sampler), which multiplies w: none, of the "
        "sequence, of its token mean, per token (rivals)",
    )
    sampler_ratio_cap: Annotated[float, Field(ge=1, allow_inf_nan=False), AfterValidator(_held_by_fp32)] | None = Field(
        None, description="v is at most this; default 2"
    )
    truncated: Literal["keep", "drop"] = Field("keep", description="responses cut at the length limit")

    @property
    def form(self) -> Form:
        return PRESETS[self.preset]

    @property
    def text_reward(self) -> str:
        """gold, cluster, majority or boxed: the reward that is made of the responses' text; none."""
        form = self.form
        if isinstance(form, PolicyGradient):
            return "none" if form.powers or form.reward == "certainty" else form.reward
        return self.task_reward or "none"

    @property
    def learns_log_z(self) -> bool:
        return self.log_z in LEARNED_LOG_Z


class OptimizerSection(Section):
    lr: NonNegativeFloat = Field(1e-6, description="AdamW's learning rate of the policy")
    log_z_lr: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="share of the mean residual that an update takes out of a learned log Z'; default 0.5"
    )
    min_lr: NonNegativeFloat | None = Field(None, description="what lr decays to; default 0")
    lr_decay: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how lr falls to min_lr over the run"
    )
    warmup_steps: NonNegativeInt = Field(0, description="steps over which lr rises from 0")
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="decay rates of AdamW's two moments"
    )
    eps: PositiveFloat = Field(1e-8, description="added to the root of AdamW's second moment")
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's, decoupled")
    clip_grad: PositiveFloat = Field(1.0, description="maximum global gradient norm")
    updates_per_rollout: PositiveInt = Field(1, description="optimizer updates made of one step's rollouts")
    distributed: bool = Field(False, description="Megatron's distributed optimizer (ZeRO-1 over dp)")
    max_skipped_steps: PositiveInt = Field(5, description="non-finite steps in a row before the run stops")


class CheckpointSection(Section):
    interval: NonNegativeInt = Field(50, description="steps between checkpoints; 0: only the last step")
    resume: str = Field(
        "latest",
        description="where a run that has checkpoints goes on: latest, an earlier one (step_000100), or never: refuse; "
        "auto is an old word for latest",
    )
    keep: PositiveInt | None = Field(None, description="newest checkpoints to keep; default: all")
    keep_every: PositiveInt | None = Field(
        None, description="steps: of every so many-th step the checkpoint stays, beside the newest; default: none"
    )
    asynchronous: bool = Field(
        True, description="write a copy of the state while training goes on; false: each save waits for the disk"
    )

    @field_validator("resume", mode="before")
    @classmethod
    def names_a_step(cls, value: Any) -> Any:
        if value in (True, "auto"):
            return "latest"
        if value is False:
            return "never"
        if value in ("latest", "never"):
            return value
        if isinstance(value, str) and (match := re.fullmatch(r"step_(\d{1,12})", value)):
            return f"step_{int(match[1]):06d}"
        raise ValueError("must be latest, never, or the name of a checkpoint, such as step_000100")


class EvaluationSection(Section):
    samples: NonNegativeInt | None = Field(
        None, description="prompts answered before and after, into samples.jsonl; default 3"
    )
    sample_tokens: PositiveInt | None = Field(
        None, description="of a sample, or rollout.max_response_tokens if that is less; default 512"
    )
    interval: NonNegativeInt = Field(0, description="steps between samples, evaluations; 0: only first and last")
    prompts: str | None = Field(None, description="prompts with answers, answered at each interval: evaluations.jsonl")
    num_prompts: PositiveInt | None = Field(None, description="only the first so many of them; default: all")
    num_responses: PositiveInt | None = Field(None, description="responses to each of them; default 4")


class MetricsSection(Section):
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="auto: online where a key is configured, else offline"
    )
    wandb_project: str | None = Field(None, description="default megatron_powerflow")
    tensorboard: bool = Field(False, description="RUN/tensorboard as well; needs the package tensorboard")
    curves: bool = Field(True, description="draw curves.png at the end of the run")

    @field_validator("wandb", mode="before")
    @classmethod
    def off_is_a_word(cls, value: Any) -> Any:
        return ("auto" if value else "off") if isinstance(value, bool) else value  # YAML reads a bare `off` as false


AlarmName = Literal["length", "short", "loss", "sampler_gap", "nothing_kept"]


class AlarmSection(Section):
    """When alarms ring. Those on lengths compare with the first steps and ask for 5 standard errors besides."""

    truncated_rise: PositiveFloat = Field(0.03, description="length: rise of the truncated share")
    length_rise: float = Field(1.3, gt=1.0, description="length: growth of the typical (geometric mean) length")
    length_fall: float = Field(0.5, gt=0.0, lt=1.0, description="short: what is left of the typical length")
    loss_growth: float = Field(10.0, gt=1.0, description="loss: against the first steps at the same alpha")
    sampler_gap: PositiveFloat | None = Field(
        None, description="sampler_gap_mean in nats per token; default by dtype: fp32 1e-3, bf16 .15, fp8 .3"
    )
    nothing_kept_steps: PositiveInt = Field(3, description="nothing_kept: steps in a row without a kept response")


class RunSection(Section):
    output_dir: str = Field(description="everything the run writes; a run has a folder of its own")
    name: str | None = Field(None, description="what reports and wandb call it; default: what is special about it")
    num_steps: PositiveInt = Field(500, description="steps of the whole run; more may be asked for later")
    seed: NonNegativeInt = Field(0, description="of sampling, the order of prompts, and all else that is drawn")
    deterministic: bool = Field(
        False,
        description="on GPUs, the same sums in the same order at every start: slower kernels of torch, Transformer "
        "Engine and NCCL, and a run that was killed ends bit-equal; on CPUs that holds anyway",
    )
    export: bool = Field(True, description="write the policy as a Hugging Face folder at the end")
    stop_at_alpha: PositiveFloat | None = Field(
        None, description="end the run when the policy is this power of the base model: see alpha_realised"
    )
    stop_before: PositiveInt | str | None = Field(
        None,
        description="save and stop (exit code 75) before this: 23h30m or seconds after the start, or a time such as "
        "2026-11-27T08:00; a SLURM job's end counts anyway",
    )
    hang_seconds: PositiveFloat = Field(
        300.0, description="a rank that is silent, or holds the others up, for so long ends the run and is named"
    )
    stop_on_alarm: bool | list[AlarmName] = Field(
        False, description="end the run when an alarm rings: true for any, or a list of their names"
    )

    @field_validator("stop_before", mode="before")
    @classmethod
    def names_a_time(cls, value: Any) -> Any:
        """Here, because the union's own errors speak of both its members."""
        if value is None or (type(value) in (int, str) and seconds_until_stop(str(value), datetime.now()) is not None):
            return value
        raise ValueError("must be a duration such as 23h30m, seconds, or a time such as 2026-11-27T08:00")

    @field_validator("stop_on_alarm", mode="before")
    @classmethod
    def names_alarms(cls, value: Any) -> Any:
        """Here, because the union's own errors speak of both its members."""
        known = get_args(AlarmName)
        if isinstance(value, bool) or (isinstance(value, list) and all(name in known for name in value)):
            return value
        raise ValueError(f"must be true, false or a list of some of [{', '.join(known)}]")


class Config(Section):
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    precision: PrecisionSection = PrecisionSection()
    prompts: PromptsSection
    rollout: RolloutSection = RolloutSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection = EvaluationSection()
    metrics: MetricsSection = MetricsSection()
    alarm: AlarmSection = AlarmSection()
    run: RunSection
