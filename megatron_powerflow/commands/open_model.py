"""What does a command outside a run work with? A model, which is checked before anything of it is on a device.

An HF folder, a run's folder, a checkpoint of it or a converted checkpoint; by path or by a name on the hub. The model
code, the scorer and the engine are those of training, under any layout.

Left out: what is done with the model (`score.py`, `generate.py`, `export.py`, ...).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from megatron_powerflow.architecture import Architecture
from megatron_powerflow.checkpoint.folder import (
    CONFIG_NAME,
    HF_NAME,
    Keeps,
    find_checkpoint,
    is_converted,
    keeps_of,
)
from megatron_powerflow.config import Config
from megatron_powerflow.config_file import load_recorded_config, parse_config
from megatron_powerflow.data.tokenizer import Tokenizer, load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.config import read_architecture, read_json
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.family import Family
from megatron_powerflow.hf.ordinary_files import require_ordinary_files
from megatron_powerflow.hub.fetch import locate
from megatron_powerflow.hub.located import NO_DOWNLOADS, LocalPaths, RequestedName
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import require_fp8_support
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.launch import Launch
from megatron_powerflow.parallel.layout import Layout, inference_layout
from megatron_powerflow.parallel.together import on_main
from megatron_powerflow.records import Prompt
from megatron_powerflow.rollout.engine import Engine
from megatron_powerflow.rollout.megatron_engine import MegatronEngine
from megatron_powerflow.serving.checks import server_violations
from megatron_powerflow.serving.pool import NoServer
from megatron_powerflow.targets import require
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.inputs import read_inputs
from megatron_powerflow.training.policy import build_engine, build_policy
from megatron_powerflow.training.served_rollouts import ServedModel, served_engine

WEIGHTS_SUFFIX = ".weights"
COMMON_KEYS = (
    *(f"parallel.{key}" for key in ("tp", "pp", "ep", "sequence_parallel")),
    "precision.dtype",
    "precision.fp8_recipe",
)


SCORE_KEYS = (*COMMON_KEYS, "parallel.micro_batch_size", "rollout.temperature")


GENERATE_KEYS = (
    *COMMON_KEYS,
    "rollout.temperature",
    "rollout.max_prompt_tokens",
    "rollout.max_response_tokens",
    "rollout.max_concurrent_rows",
    "rollout.stop_token_ids",
    "prompts.too_long",
    "run.seed",
)
SERVER_KEYS = tuple(
    f"rollout.vllm.{key}" for key in ("urls", "transport", "max_requests", "answer_seconds", "wait_seconds")
)


OF_THE_RUN = (
    "temperature",
    "max_prompt_tokens",
    "max_response_tokens",
    "stop_token_ids",
)  # of `rollout`; what a run's folder stands for


@dataclass(frozen=True)
class OpenModel:
    """A model folder that was checked and is usable; nothing of it is on a device yet."""

    config: Config
    layout: Layout
    architecture: Architecture
    family: Family
    tokenizer: Tokenizer
    hf_folder: Path  # config and tokenizer; the weights too, unless there is a checkpoint
    checkpoint: Path | None
    keeps: Keeps  # what a command that reads this model may not replace
    located: LocalPaths = NO_DOWNLOADS  # the command's names on the hub


def open_named(
    model: str,
    overrides: Sequence[str],
    allowed: Sequence[str],
    launch: Launch,
    *,
    reference: bool = False,
    engine: str = "megatron",
    data: Mapping[str, Sequence[str]] | None = None,
) -> OpenModel:
    """Open a model by a path or by a name on the hub, and fetch what of it and of `data` lies on the hub.

    data: names of data by the option that they were given to. Collective where a name is the hub's. Raises UserError
    as `open_model` does, or where something cannot be fetched, on all processes alike.
    """
    wanted = [RequestedName("model", model, "--model")]
    recorded: Mapping[str, str] = {}
    wanted += [RequestedName("dataset", name, option) for option, names in (data or {}).items() for name in names]
    checkpoint = find_checkpoint(Path(model)) if reference and Path(model).is_dir() else None
    if checkpoint is not None and not is_converted(checkpoint):
        wanted.append(
            RequestedName("model", load_recorded_config(checkpoint / CONFIG_NAME).model.hf_path, "--reference")
        )
        began = read_inputs(checkpoint)
        recorded = began.revisions if began else {}

    def opened(located: LocalPaths) -> OpenModel:
        return open_model(
            model, overrides, allowed, launch.world_size, reference=reference, engine=engine, located=located
        )

    return opened(locate(wanted, launch, recorded=lambda: recorded, check=opened))


def open_model(
    model: str | Path,
    overrides: Sequence[str],
    allowed: Sequence[str],
    world_size: int,
    *,
    reference: bool = False,
    engine: str = "megatron",
    located: LocalPaths = NO_DOWNLOADS,
) -> OpenModel:
    """Open an HF folder, a run's folder (its latest checkpoint), a checkpoint or a converted one.

    Numbers default to what the folder says: the run's precision, temperature and lengths, or config.json's dtype.
    reference: open the base model that the run started from, with the run's numbers. engine: who is to sample. located:
    what `locate` returned; by default every name is a path. Raises UserError with every violation.
    """
    foreign = [item for item in overrides if "=" in item and item.split("=", 1)[0] not in allowed]
    if foreign:
        raise UserError(
            [f"{item.split('=', 1)[0]} has no effect here; known: {', '.join(allowed)}" for item in foreign]
        )
    folder = located.folder(model)
    checkpoint = find_checkpoint(folder) if folder.is_dir() else None
    if reference and (checkpoint is None or is_converted(checkpoint)):
        raise UserError(f"{folder}: --reference asks for the base model of a run, and this is no run's folder")
    keeps = keeps_of(folder)
    run = None if checkpoint is None or is_converted(checkpoint) else load_recorded_config(checkpoint / CONFIG_NAME)
    if reference:
        assert run is not None, "else refused above"
        folder = located.folder(run.model.hf_path)
        checkpoint = folder if is_converted(folder) else None
    hf_folder = checkpoint / HF_NAME if checkpoint else folder
    require_ordinary_files(hf_folder)
    architecture, family = read_architecture(hf_folder, FAMILIES)
    if run:
        precision = {"dtype": run.precision.dtype, "fp8_recipe": run.precision.fp8_recipe}
        rollout = {name: value for name in OF_THE_RUN if (value := getattr(run.rollout, name)) is not None}
    else:
        raw = read_json(hf_folder / "config.json", "the model's config.json")
        precision = {"dtype": "fp32" if raw.get("dtype", raw.get("torch_dtype")) in (None, "float32") else "bf16"}
        rollout = {"temperature": 1.0}
    values = {
        "model": {"hf_path": str(hf_folder)},
        "precision": {key: value for key, value in precision.items() if value is not None},
        "parallel": {"micro_batch_size": 4},
        "prompts": {"path": "unused"},
        "rollout": rollout | {"engine": engine},
        "run": {"output_dir": "unused"},
    }
    config = parse_config(values, overrides)
    require(server_violations(config))
    require_fp8_support(config.precision, architecture, config.parallel)
    layout = inference_layout(config.parallel, architecture, world_size)
    tokenizer = load_tokenizer(hf_folder)
    return OpenModel(config, layout, architecture, family, tokenizer, hf_folder, checkpoint, keeps, located)


def say_notices(opened: OpenModel, launch: Launch, console: Console) -> None:
    """Print what the tokenizer's files leave open, before any text is read by them."""
    if launch.is_main:
        for notice in opened.tokenizer.notices:
            console.print(f"notice: {notice}")


@contextmanager
def sampling_engine(
    opened: OpenModel, groups: Groups, prompts: Sequence[Prompt], out: Path, console: Console
) -> Iterator[Engine]:
    """Load the model, and yield the engine of training over it, or over the vLLM servers of rollout.vllm.urls.

    Servers get the model's weights first, by the folder OUT.weights, which is gone at the end, and prove them by the
    first prompts. prompts: all that are to be answered. Collective.
    """
    chunks, config = load_chunks(opened, groups), opened.config
    if config.rollout.engine != "vllm":
        yield engine_of(opened, chunks, groups)
        return
    weights = out.with_name(out.name + WEIGHTS_SUFFIX)
    on_main(lambda: _make_empty(weights), groups)
    model = ServedModel(config, opened.layout, opened.architecture, opened.family, chunks, weights)
    vocab_size, tp_split = opened.architecture.vocab_size, opened.layout.sequence_parallel
    scorer = Scorer(groups, vocab_size, config.rollout.temperature, tp_split)
    engine = served_engine(model, groups, prompts, scorer, run_id="answers", say=console.print)
    try:
        with closing(engine):
            yield engine
    except NoServer as error:
        raise UserError(
            f"{error}; start one with the command of `powerflow vllm-args`, and this command again"
        ) from None
    finally:
        if groups.is_main:
            shutil.rmtree(weights, ignore_errors=True)


def _make_empty(folder: Path) -> None:
    """Make a folder. Raises UserError where something of that name is there: it is not ours to remove."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{folder} is there already: of a command that is answering into the same --out, or was killed; remove it"
        ) from None


def engine_of(opened: OpenModel, chunks: Sequence[PolicyModel], groups: Groups) -> MegatronEngine:
    """Return the in-process engine of training over these chunks."""
    return build_engine(chunks, opened.architecture, opened.layout, opened.config, groups)


def load_chunks(opened: OpenModel, groups: Groups) -> list[PolicyModel]:
    """Load the folder's weights into this rank's model chunks, for forward passes only. Collective."""
    weights = opened.checkpoint or opened.hf_folder
    model = opened.config.model.model_copy(update={"hf_path": str(weights)})
    chunks = build_policy(opened.architecture, opened.family, opened.layout, model, opened.config.precision, groups)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks
