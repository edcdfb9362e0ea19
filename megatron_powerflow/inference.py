"""How are files scored and answered outside a run? `powerflow score` and `powerflow generate`.

The same model code, scorer and engine as in training, under any layout, from an HF folder or a checkpoint.

Left out: how the lines come into their file (`output_lines.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_powerflow.checkpoint import storage
from megatron_powerflow.checkpoint.folder import (
    CONFIG_NAME,
    HF_NAME,
    Keeps,
    find_checkpoint,
    is_converted,
    keeps_of,
    run_of,
)
from megatron_powerflow.config import Config, load_config, parse_config
from megatron_powerflow.conversion.checked import open_checked
from megatron_powerflow.conversion.families import FAMILIES
from megatron_powerflow.conversion.hf_config import Family, read_architecture, read_json
from megatron_powerflow.conversion.shards import export_to_hf, load_from_hf
from megatron_powerflow.data.packing import Annotated, pack
from megatron_powerflow.data.prompts import Rewrite, check_token_ids, load_prompts, prompt_token_ids
from megatron_powerflow.data.rows import read_file
from megatron_powerflow.data.tokenizer import Tokenizer, load_tokenizer
from megatron_powerflow.errors import UserError
from megatron_powerflow.hub.fetch import locate
from megatron_powerflow.hub.located import AS_NAMED, Located, Wanted
from megatron_powerflow.model.build import build_chunks, transformer_config
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import require_fp8_support
from megatron_powerflow.model_card import card_files
from megatron_powerflow.output_lines import BY_GENERATE, SCORED, output_refusals, write_rounds
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.initialize import Launch, initialized
from megatron_powerflow.parallel.layout import Layout, inference_layout
from megatron_powerflow.records import Architecture, Prompt, Purpose, Rollout, SamplingParams
from megatron_powerflow.rollout.in_step import largest
from megatron_powerflow.rollout.megatron_engine import MegatronEngine
from megatron_powerflow.targets import export_target, require
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.inputs import read_inputs
from megatron_powerflow.training.plan import stop_token_ids_of
from megatron_powerflow.training.score import score
from megatron_powerflow.training.setup import alignment

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
OF_THE_RUN = (
    "temperature",
    "max_prompt_tokens",
    "max_response_tokens",
    "stop_token_ids",
)  # of `rollout`; what a run's folder stands for
FILLER = Rollout(Prompt("", 0, (0,)), -1, 0, (0,), (0.0,), "eos")  # scored and thrown away
ROUND_ROWS = 64  # rows to score, or responses to draw, per data-parallel rank between two writes


@dataclass(frozen=True)
class Opened:
    """A model folder that has been found usable; nothing of it is on a device yet."""

    config: Config
    layout: Layout
    architecture: Architecture
    family: Family
    tokenizer: Tokenizer
    hf_folder: Path  # config and tokenizer; the weights too, unless there is a checkpoint
    checkpoint: Path | None
    keeps: Keeps  # what a command that reads this model may not replace
    located: Located = AS_NAMED  # the command's names on the hub


def open_named(
    model: str,
    overrides: Sequence[str],
    allowed: Sequence[str],
    launch: Launch,
    *,
    reference: bool = False,
    data: Mapping[str, Sequence[str]] | None = None,
) -> Opened:
    """`open_model` of a path or of a name on the hub, which is fetched; so is what of `data` is the hub's.

    data: names of data by the option that they were given to. Collective where a name is the hub's; UserErrors of its
    part are raised on all processes alike.
    """
    wanted, recorded = [Wanted("model", model, "--model")], {}
    wanted += [Wanted("dataset", name, option) for option, names in (data or {}).items() for name in names]
    checkpoint = find_checkpoint(Path(model)) if reference and Path(model).is_dir() else None
    if checkpoint is not None and not is_converted(checkpoint):
        wanted.append(Wanted("model", load_config(checkpoint / CONFIG_NAME).model.hf_path, "--reference"))
        began = read_inputs(checkpoint)
        recorded = began.revisions if began else {}

    def opened(located: Located) -> Opened:
        return open_model(model, overrides, allowed, launch.world_size, reference=reference, located=located)

    return opened(locate(wanted, launch, recorded=lambda: recorded, judge=opened))


def open_model(
    model: str | Path,
    overrides: Sequence[str],
    allowed: Sequence[str],
    world_size: int,
    *,
    reference: bool = False,
    located: Located = AS_NAMED,
) -> Opened:
    """An HF folder, a run's folder (its latest checkpoint), a checkpoint or a converted one.

    Raises UserError with every violation. Numbers default to what the folder says: the run's precision, temperature and
    lengths, or config.json's dtype.
    reference: not the run's policy but the base model that it started from, with the run's numbers. located: what
    `locate` found; by default every name is a path.
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
    of_a_run = checkpoint is not None and not is_converted(checkpoint)
    keeps = keeps_of(folder)
    run = load_config(checkpoint / CONFIG_NAME) if of_a_run else None
    if reference:
        folder = located.folder(run.model.hf_path)
        checkpoint = folder if is_converted(folder) else None
    hf_folder = checkpoint / HF_NAME if checkpoint else folder
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
        "prompts": {"path": "unused"},
        "rollout": rollout,
        "run": {"output_dir": "unused"},
    }
    config = parse_config(values, overrides)
    require_fp8_support(config.precision, architecture, config.parallel.cp)
    layout = inference_layout(config.parallel, architecture, world_size)
    tokenizer = load_tokenizer(hf_folder)
    return Opened(config, layout, architecture, family, tokenizer, hf_folder, checkpoint, keeps, located)


def score_file(opened: Opened, data: str | Path, out: Path, launch: Launch, console: Console) -> None:
    """One line per row of `data`, a file or one on the hub: id, log_probs (one per response token, natural logarithm),
    sequence_log_prob."""
    say_notices(opened, launch, console)
    require(output_refusals(out, SCORED))
    rows = read_scored_rows(opened.located.file(data), opened)
    with initialized(opened.layout, launch, seed=0) as groups:
        chunks = load_chunks(opened, groups)
        scorer = Scorer(
            groups, opened.architecture.vocab_size, opened.config.rollout.temperature, opened.layout.sequence_parallel
        )
        reports = groups.is_last_stage and groups.tp_rank == 0

        def one_round(mine: Sequence[Rollout]) -> list[tuple[int, dict]] | None:
            rows = _as_many_as_others(mine, groups)
            found = score_rollouts(rows, chunks, scorer, opened) if rows else []
            return [(slot, line) for slot, line in found if slot != FILLER.slot] if reports else None

        write_rounds(rows, one_round, ROUND_ROWS, out, groups, console, "powerflow score")


def _as_many_as_others(mine: Sequence[Rollout], groups: Groups) -> list[Rollout]:
    """Filled up: ranks that share experts make the same number of forward passes."""
    return [*mine, *[FILLER] * (largest(len(mine), groups) - len(mine))]


def score_rollouts(
    rollouts: Sequence[Rollout], chunks: Sequence[PolicyModel], scorer: Scorer, opened: Opened
) -> list[tuple[int, dict]]:
    """(slot, output line) of each rollout on the last stage, an empty list elsewhere."""
    by_slot = {rollout.slot: rollout for rollout in rollouts}
    return [
        (slot, {"id": by_slot[slot].prompt.id, "log_probs": log_probs, "sequence_log_prob": sum(log_probs)})
        for slot, log_probs in log_probs_by_slot(rollouts, chunks, scorer, opened).items()
    ]


def log_probs_by_slot(
    rollouts: Sequence[Rollout], chunks: Sequence[PolicyModel], scorer: Scorer, opened: Opened
) -> dict[int, list[float]]:
    """Log-probs of each rollout's response tokens on the last stage, nothing elsewhere. Slots are unique."""
    batches = pack(
        [Annotated(rollout) for rollout in rollouts],
        micro_batch_size=opened.config.parallel.micro_batch_size,
        responses_per_prompt=1,
        drop_truncated=False,
        multiple=alignment(opened.layout, opened.config.precision),
        uniform=False,
        device=scorer.groups.device,
    )
    found = {}
    for batch, scored in zip(batches, score(chunks, batches, scorer), strict=True):
        if scored is None:
            continue
        for row, slot in enumerate(batch.group.tolist()):
            found[slot] = scored[row][batch.loss_mask[row]].tolist()
    return found


def generate_file(
    opened: Opened, prompts: str | Path, out: Path, num_responses: int, greedy: bool, launch: Launch, console: Console
) -> None:
    """One line per response: id, response_index, text, response_token_ids, log_probs, finish_reason."""
    require(output_refusals(out, *BY_GENERATE))
    asked = load_generation_prompts(opened, prompts, launch, console)
    temperature = 0.0 if greedy else opened.config.rollout.temperature
    sampling = sampling_params(opened, responses_per_prompt=num_responses, temperature=temperature)
    with initialized(opened.layout, launch, seed=opened.config.run.seed) as groups:
        engine = build_engine(opened, load_chunks(opened, groups), groups)
        reports = groups.pp_rank == 0 and groups.tp_rank == 0

        def one_round(mine: Sequence[tuple[int, Prompt]]) -> list[tuple[int, dict]] | None:
            rollouts = engine.generate(mine, sampling)
            return (
                [(rollout.slot, response_line(rollout, opened.tokenizer)) for rollout in rollouts] if reports else None
            )

        per_round = prompts_per_round(opened, num_responses)
        write_rounds(list(enumerate(asked)), one_round, per_round, out, groups, console, "powerflow generate")


def say_notices(opened: Opened, launch: Launch, console: Console) -> None:
    """What the tokenizer's files leave open, before any text is read by them."""
    if launch.is_main:
        for notice in opened.tokenizer.notices:
            console.print(f"notice: {notice}")


def load_generation_prompts(
    opened: Opened, name: str | Path, launch: Launch, console: Console, rewrite: Rewrite | None = None
) -> tuple[Prompt, ...]:
    """The prompts to answer; UserError where they, or the model, have no room for what is asked. name: a file, or data
    on the hub."""
    say_notices(opened, launch, console)
    check_room(opened)
    rollout = opened.config.rollout
    prompts = load_prompts(
        opened.located.files(name),
        opened.tokenizer,
        vocab_size=opened.architecture.vocab_size,
        max_prompt_tokens=rollout.max_prompt_tokens,
        too_long=opened.config.prompts.too_long,
        rewrite=rewrite,
    )
    if prompts.num_too_long and launch.is_main:
        console.print(f"{prompts.num_too_long} prompts over rollout.max_prompt_tokens dropped")
    return prompts.prompts


def check_room(opened: Opened) -> None:
    """Raises UserError where the model has no positions for the longest prompt and response."""
    rollout = opened.config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if longest > opened.architecture.max_positions:
        raise UserError(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} is over the model's "
            f"{opened.architecture.positions_field}={opened.architecture.max_positions}; lower one of them"
        )


def sampling_params(opened: Opened, *, responses_per_prompt: int, temperature: float) -> SamplingParams:
    """Of step 0, to the length limit of the config."""
    return SamplingParams(
        responses_per_prompt=responses_per_prompt,
        max_response_tokens=opened.config.rollout.max_response_tokens,
        temperature=temperature,
        stop_token_ids=stop_token_ids_of(opened.config, opened.hf_folder, opened.tokenizer, opened.architecture),
        seed=opened.config.run.seed,
        step=0,
        purpose=Purpose.ANSWERS,
    )


def build_engine(opened: Opened, chunks: Sequence[PolicyModel], groups: Groups) -> MegatronEngine:
    """The engine over these chunks."""
    return MegatronEngine(
        chunks,
        groups,
        vocab_size=opened.architecture.vocab_size,
        max_concurrent_rows=opened.config.rollout.max_concurrent_rows,
        alignment=alignment(opened.layout, opened.config.precision),
    )


def prompts_per_round(opened: Opened, responses_per_prompt: int) -> int:
    """Prompts a data-parallel rank answers between two writes."""
    return max(1, max(ROUND_ROWS, opened.config.rollout.max_concurrent_rows) // responses_per_prompt)


def export_file(opened: Opened, out: Path, launch: Launch, console: Console, *, command: str = "") -> None:
    """A checkpoint's policy as an HF folder, with a model card where it is a run's. Raises UserError for a folder that
    is no checkpoint."""
    if opened.checkpoint is None:
        raise UserError(f"{opened.hf_folder}: no checkpoint of a run; it is a Hugging Face folder already")
    require(export_target(out).refusals(apart_from=opened.keeps.apart_from, not_over=opened.keeps.not_over))
    card = None
    if launch.is_main and not is_converted(opened.checkpoint):
        card = card_files(run_of(opened.checkpoint), storage.read_progress(opened.checkpoint).step, command)
    with initialized(opened.layout, launch, seed=0) as groups:
        chunks = load_chunks(opened, groups)
        export_to_hf(
            chunks,
            opened.architecture,
            opened.family,
            groups,
            companions=opened.hf_folder,
            out=out,
            source=opened.checkpoint,
            more=card,
        )
    if launch.is_main:
        console.print(f"wrote {out}{served_at(opened.config.rollout.temperature)}")


def served_at(temperature: float) -> str:
    """What an export of a run at a temperature other than 1 needs said: no file of it does. "" at 1."""
    if temperature == 1.0:
        return ""
    return f"; it was trained at rollout.temperature={temperature:g} and must be served at that temperature"


def read_scored_rows(path: Path, opened: Opened) -> list[Rollout]:
    """Rows to score: a prompt in any of its forms, and `response` (text) or `response_token_ids`.

    A text is scored as it is, without an EOS behind it. Raises UserError with the bad lines.
    """
    vocab_size, tokenizer = opened.architecture.vocab_size, opened.tokenizer
    rows, violations = [], []
    for number, row in read_file(path, violations):
        try:
            prompt = prompt_token_ids(row, tokenizer, vocab_size)
            response = _response_token_ids(row, tokenizer, vocab_size)
        except UserError as error:
            violations.append(f"{path}:{number}: {error}")
            continue
        total = len(prompt) + len(response)
        if total > opened.architecture.max_positions:
            violations.append(f"{path}:{number}: {total} tokens, over the model's {opened.architecture.max_positions}")
        identity = str(row.get("id", number - 1))
        rows.append(
            Rollout(
                prompt=Prompt(identity, number - 1, tuple(prompt)),
                slot=len(rows),
                response_index=0,
                response_token_ids=tuple(response),
                rollout_log_probs=(0.0,) * len(response),
                finish_reason="eos",
            )
        )
    if violations or not rows:
        raise UserError(violations or [f"{path}: no rows in it"])
    return rows


def _response_token_ids(row: dict[str, Any], tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    given = [name for name in ("response", "response_token_ids") if row.get(name) is not None]
    if len(given) != 1:
        raise UserError(f"needs exactly one of response, response_token_ids; got {given or sorted(row)[:8]}")
    if given[0] == "response_token_ids":
        return check_token_ids(row["response_token_ids"], vocab_size, "response_token_ids")
    if not isinstance(row["response"], str):
        raise UserError(f"response must be a text, got {row['response']!r:.60}")
    return check_token_ids(tokenizer.encode_plain(row["response"]), vocab_size, "response (tokenized)")


def response_line(rollout: Rollout, tokenizer: Tokenizer) -> dict:
    """What the output file says of a rollout."""
    return {
        "id": rollout.prompt.id,
        "response_index": rollout.response_index,
        "text": tokenizer.decode(rollout.response_token_ids),
        "response_token_ids": list(rollout.response_token_ids),
        "log_probs": list(rollout.rollout_log_probs),
        "finish_reason": rollout.finish_reason,
    }


def load_chunks(opened: Opened, groups: Groups) -> list[PolicyModel]:
    """This rank's model chunks, with the folder's weights, for forward passes only."""
    config, architecture = opened.config, opened.architecture
    transformer = transformer_config(architecture, opened.layout, config.model, config.precision)
    chunks = build_chunks(transformer, architecture, opened.layout, config.precision, groups.device)
    if opened.checkpoint is not None:
        storage.load_weights(opened.checkpoint, chunks, groups)
    else:
        source = open_checked(opened.hf_folder, architecture, opened.family)
        load_from_hf(chunks, source, architecture, opened.family, groups)
    for chunk in chunks:
        chunk.eval().requires_grad_(False)
    return chunks
