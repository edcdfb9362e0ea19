"""What is left of a run whose steps change nothing? Why it stops, and a folder to look at its last step with.

    RUN/dump_step_000007/
        policy/            the weights that step 7 found and left, as a plain Hugging Face folder
        responses.jsonl    its prompts and responses, as `powerflow score` reads them
        scores.jsonl       log-probs, log Z', residual and loss of each, and which of these are not finite
        rollouts/          the same rollouts, as `rollout.replay` reads them
        config.yaml        the run's config
        dump.json          the checkpoint before it, tensors that are not finite, the commands that score again

`powerflow score` with policy/ and with the base gives the log-probs token by token and names those that are not finite.

Left out: counting skipped steps (`train.py`); how a step is skipped (`optimizer.py`).
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_powerflow.checkpoint.folder import CONFIG_NAME, latest_checkpoint
from megatron_powerflow.checkpoint.state import RunProgress
from megatron_powerflow.config import Config, OptimizerSection
from megatron_powerflow.config_file import dump_config
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.finite import not_finite
from megatron_powerflow.hf.live_weights import export_to_hf
from megatron_powerflow.metrics.provenance import provenance
from megatron_powerflow.parallel.together import on_main
from megatron_powerflow.records import ROLLOUT_COLUMNS, Rollout
from megatron_powerflow.rollout.rollout_files import ROLLOUTS_NAME, step_file, write_rollouts
from megatron_powerflow.targets import TargetFolder
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.rollout_exchange import to_main
from megatron_powerflow.training.session import Session
from megatron_powerflow.training.step import StepResult

POLICY_NAME, RESPONSES_NAME, SCORES_NAME, DUMP_NAME = "policy", "responses.jsonl", "scores.jsonl", "dump.json"
SCORES = ("sequence_log_prob", "ref_sequence_log_prob", "rollout_sequence_log_prob", "loss_term")
NUMBERS = ("alpha", "psi", "reward_scale", "kl_coefficient")  # of `objective`, that a loss grows with
SCORES_OF_BALANCE = ("log_z", "residual")


def refuse_endless_skipping(plan: Plan, session: Session, result: StepResult, progress: RunProgress) -> None:
    """Raise UserError when optimizer.max_skipped_steps in a row changed nothing, the last of them `result`.

    Leaves a dump of that step where something was not finite. Collective.
    """
    if progress.skipped_in_a_row < plan.config.optimizer.max_skipped_steps:
        return
    if not result.rows[:, ROLLOUT_COLUMNS.index("kept")].any():
        raise UserError(_nothing_kept(plan, progress.skipped_in_a_row))
    folder = dump_folder(plan.run_folder, progress.step)
    try:
        write_dump(folder, plan, session, result, progress)
    except UserError as error:
        raise UserError([_not_finite(plan, progress), *error.violations]) from None
    score = commands(folder, plan)["policy"]
    raise UserError(
        f"{_not_finite(plan, progress)}. What the last of these steps was made of is in {folder}; its log-probs again, "
        f"token by token: {score}"
    )


def dump_folder(run: Path, step: int) -> Path:
    """Return where the dump of step `step`, counted from 1 as the console does, lies."""
    return run / f"dump_step_{step:06d}"


def write_dump(folder: Path, plan: Plan, session: Session, result: StepResult, progress: RunProgress) -> None:
    """Write the folder, which then holds what the step was made of, or appears not at all. Collective.

    Raises UserError where it cannot be written.
    """
    groups, target = session.groups, TargetFolder(folder, "powerflow train, a dump", label="the dump")
    chunks = session.trainable.chunks
    weights = not_finite(chunks, plan.family, groups)
    gradients = not_finite(chunks, plan.family, groups, gradients=True)
    rollouts = to_main(result.rollouts, groups)
    on_main(target.begin, groups)
    try:
        export_to_hf(
            chunks,
            plan.architecture,
            plan.family,
            groups,
            companions=plan.hf_folder,
            out=target.partial / POLICY_NAME,
            source=plan.run_folder,
        )

        def finish() -> None:
            write_rollouts(
                step_file(target.partial / ROLLOUTS_NAME, progress.step - 1),
                rollouts,
                step=progress.step - 1,
                vocab_size=plan.architecture.vocab_size,
                temperature=plan.config.rollout.temperature,
            )
            (target.partial / CONFIG_NAME).write_text(dump_config(plan.config), encoding="utf-8")
            _write_lines(target.partial / RESPONSES_NAME, [_response_line(rollout) for rollout in rollouts])
            scores = [_score_line(rollout, row, plan) for rollout, row in zip(rollouts, result.rows, strict=True)]
            _write_lines(target.partial / SCORES_NAME, scores)
            about = {
                "step": progress.step,
                "checkpoint": str(latest_checkpoint(plan.run_folder) or plan.config.model.hf_path),
                "skipped_in_a_row": progress.skipped_in_a_row,
                "updates": [
                    {"grad_norm": _finite(taken.grad_norm), "applied": taken.applied}
                    for taken in result.optimizer_steps
                ],
                "weights_not_finite": [list(names) for names in weights],
                "gradients_not_finite": [list(names) for names in gradients],
                "responses_not_finite": [line["id"] for line in scores if line["not_finite"]],
                "commands": commands(folder, plan),
                **provenance(""),
            }
            (target.partial / DUMP_NAME).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            target.publish()

        on_main(finish, groups)
    finally:
        if groups.is_main and target.partial.is_dir():
            shutil.rmtree(target.partial, ignore_errors=True)


def commands(folder: Path, plan: Plan) -> dict[str, str]:
    """Return the commands that score the dump's responses by its policy and by the base: can be typed as they stand."""
    config = plan.config
    settings = [f"precision.dtype={config.precision.dtype}", f"rollout.temperature={config.rollout.temperature:g}"]
    if config.precision.fp8_recipe is not None:
        settings.append(f"precision.fp8_recipe={config.precision.fp8_recipe}")
    data = str(folder / RESPONSES_NAME)
    return {
        name: shlex.join(
            [
                *("powerflow", "score", "--model", str(model), "--data", data),
                *("--out", str(folder.with_name(f"{folder.name}_{name}.jsonl")), *settings),
            ]
        )
        for name, model in (("policy", folder / POLICY_NAME), ("base", plan.config.model.hf_path))
    }


def going_on(config: Config, *overrides: str) -> str:
    """Return the command that continues this run, in its folder, with other settings: can be typed as it stands."""
    return shlex.join(["powerflow", "train", f"{config.run.output_dir}/{CONFIG_NAME}", *overrides])


def again(config: Config, *overrides: str) -> str:
    """Return the command that starts this run anew, in a new folder, with other settings: can be typed as it stands."""
    run = config.run.output_dir
    return shlex.join(["powerflow", "train", f"{run}/{CONFIG_NAME}", f"run.output_dir={run}_again", *overrides])


def _not_finite(plan: Plan, progress: RunProgress) -> str:
    """Say what happened and what to do. Where no step was ever finite the weights are the base's, and it is not lr."""
    what = f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; the weights are"
    optimizer, objective = plan.config.optimizer, plan.config.objective
    if progress.num_skipped < progress.step:
        lower = min(optimizer.lr / 10, OptimizerSection.model_fields["lr"].default)
        latest, rate = latest_checkpoint(plan.run_folder), f"optimizer.lr={lower:g}"
        if latest is None:
            return f"{what} those before them. Start anew with a lower learning rate: {again(plan.config, rate)}"
        return (
            f"{what} those before them. Go on from {latest.name} with a lower learning rate (checkpoint.resume=step_N "
            f"takes an earlier one): {going_on(plan.config, rate)}"
        )
    numbers = [name for name in NUMBERS if getattr(objective, name) is not None]
    if plan.config.precision.dtype != "fp32":
        numbers_in_fp32 = again(
            plan.config, "precision.dtype=fp32", "precision.fp8_recipe=null", "precision.fp8_format=null"
        )
        return f"{what} the base's still, for no step of this run was finite. Start anew in fp32: {numbers_in_fp32}"
    defaults = again(plan.config, *(f"objective.{name}=null" for name in numbers))
    return (
        f"{what} the base's still, for no step of this run was finite: the objective asks for numbers that are too "
        f"large. Start anew with its own: {defaults}"
    )


def _nothing_kept(plan: Plan, skipped: int) -> str:
    rollout = plan.config.rollout
    return (
        f"{skipped} steps in a row had no response to learn from: all were cut at "
        f"rollout.max_response_tokens={rollout.max_response_tokens} and objective.truncated=drop. Raise that limit in "
        f"a new folder, or keep such responses: {again(plan.config, 'objective.truncated=keep')}"
    )


def _response_line(rollout: Rollout) -> dict:
    return {
        "id": _name(rollout),
        "prompt_token_ids": rollout.prompt.token_ids,
        "response_token_ids": rollout.response_token_ids,
    }


def _score_line(rollout: Rollout, row, plan: Plan) -> dict:
    columns = dict(zip(ROLLOUT_COLUMNS, row.tolist(), strict=True))
    watched = SCORES + (SCORES_OF_BALANCE if plan.config.objective.log_z is not None else ())
    values = {name: _finite(columns[name]) for name in watched}
    bad = [name for name in watched if values[name] is None]
    return {"id": _name(rollout), "kept": bool(columns["kept"]), **values, "not_finite": bad}


def _name(rollout: Rollout) -> str:
    return f"{rollout.prompt.id}/{rollout.response_index}"


def _finite(value: float) -> float | None:
    """The number, or None, as JSON knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _write_lines(path: Path, lines: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
