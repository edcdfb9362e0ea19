"""How is a run's state put on disk so that a crash loses nothing that was finished?

    RUN/checkpoints/step_000050/     policy/   torch_dist shards of weights and optimizer (any layout can load them)
                                     hf/       the source's config.json, tokenizer, generation config, chat template
                                     log_z_head.safetensors, progress.json, config.yaml, SHA256SUMS
    RUN/checkpoints/latest           the name of the newest complete checkpoint

A checkpoint is written under another name and renamed when complete; `latest` is replaced after that. A full disk or
a kill in between leaves the one before as it was.

Left out: asynchronous saving; the Hugging Face export (`hf/live_weights.py`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from megatron_powerflow.checkpoint.digests import check_share, digest_share, write_sums
from megatron_powerflow.checkpoint.folder import (
    HF_NAME,
    INPUTS_NAME,
    LATEST_NAME,
    POLICY_NAME,
    checkpoint_name,
    checkpoints_of,
    is_converted,
    tensors_folder,
)
from megatron_powerflow.checkpoint.pickle_audit import audit_checkpoint
from megatron_powerflow.checkpoint.state import FORMAT, RunProgress, Trainable
from megatron_powerflow.errors import UserError
from megatron_powerflow.hf.files import copy_companions
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, gather_to_main, raise_together
from megatron_powerflow.whole_files import give_usual_mode, sync, write_file

HEAD_FILE = "log_z_head.safetensors"
PROGRESS_FILE = "progress.json"
EXTRA_STATE = "_extra_state"
# "fully_reshardable": optimizer moments are stored like weights, whatever split wrote them
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
IO_ERRORS = (OSError, RuntimeError, CheckpointException, CheckpointingException, SafetensorError)


def save(
    run: Path, trainable: Trainable, progress: RunProgress, groups: Groups, *, companions: Path, keep: int | None
) -> Path:
    """Write a checkpoint of this step and make it `latest`. Collective. Returns its folder.

    companions: the HF folder whose small files make the checkpoint self-contained. keep: newest to keep, None: all.
    Raises UserError when the disk fills up or cannot be written; the previous checkpoint is still there then.
    """
    final = run / "checkpoints" / checkpoint_name(progress.step)
    partial = final.with_name(final.name + ".partial")
    failure = None
    if groups.is_main:
        failure = attempt(lambda: _fresh_folder(partial), *IO_ERRORS)
    _stop_together(failure, partial, groups)
    failure = attempt(lambda: _save_policy(partial / POLICY_NAME, trainable, groups), *IO_ERRORS)
    _stop_together(failure, partial, groups)
    head = trainable.head
    if head is not None and groups.tp_rank == groups.cp_rank == groups.dp_rank == 0:
        failure = attempt(lambda: _save_head(partial / HEAD_FILE, head), *IO_ERRORS)
    if groups.is_main and failure is None:
        failure = attempt(lambda: _save_small_files(run, partial, progress, companions), *IO_ERRORS)
    _stop_together(failure, partial, groups)
    digests: dict[str, str] = {}
    failure = attempt(lambda: digests.update(digest_share(partial, groups.rank, groups.world_size)), *IO_ERRORS)
    _stop_together(failure, partial, groups)
    shares = gather_to_main(digests, groups)
    if shares is not None:
        failure = attempt(lambda: _finish(run, partial, final, shares, keep), *IO_ERRORS)
    _stop_together(failure, partial, groups)
    return final


def load(checkpoint: Path, trainable: Trainable, groups: Groups) -> RunProgress:
    """Fill `trainable` in place from a checkpoint of any layout. Collective.

    Nothing in the checkpoint is executed: pickled parts are audited first. Raises UserError when it is damaged.
    """
    progress = read_progress(checkpoint)
    _refuse_damage(checkpoint, groups)
    audit_checkpoint(checkpoint / POLICY_NAME)
    _init_optimizer_state(trainable)
    sharded = _sharded_state(trainable, groups, is_loading=True)
    try:
        state = dist_checkpointing.load(sharded, str(checkpoint / POLICY_NAME))
        saved = dist_checkpointing.load_common_state_dict(str(checkpoint / POLICY_NAME))
    except IO_ERRORS as error:
        raise UserError(f"{checkpoint}: cannot be loaded: {' '.join(str(error).split())[:500]}") from error
    _load_chunks(trainable.chunks, state)
    _load_optimizer(trainable, _fitting(state["optimizer"], sharded["optimizer"], saved["optimizer"]))
    if trainable.head is not None:
        _load_head(checkpoint / HEAD_FILE, trainable.head)
    return progress


def load_weights(checkpoint: Path, chunks: list, groups: Groups) -> None:
    """Only the policy's weights, for scoring and generating. Collective; any layout. A converted checkpoint, which has
    no list of digests, serves too."""
    if not is_converted(checkpoint):
        _refuse_damage(checkpoint, groups)
    folder = tensors_folder(checkpoint)
    audit_checkpoint(folder)
    sharded = {f"model{index}": _model_state(chunk) for index, chunk in enumerate(chunks)}
    try:
        state = dist_checkpointing.load(sharded, str(folder))
    except IO_ERRORS as error:
        raise UserError(f"{checkpoint}: cannot be loaded: {' '.join(str(error).split())[:500]}") from error
    _load_chunks(chunks, state)


def read_progress(checkpoint: Path) -> RunProgress:
    """progress.json of a checkpoint. Raises UserError when it is missing, damaged or of another format."""
    path = checkpoint / PROGRESS_FILE
    try:
        if path.exists() and not path.is_file():
            raise OSError("no ordinary file")
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is {checkpoint} a checkpoint of this program?") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise UserError(f"{path}: not a progress file of format {FORMAT}")
    return RunProgress.from_json(values, str(path))


def _refuse_damage(checkpoint: Path, groups: Groups) -> None:
    """Every rank checks its share of the files; all of them refuse together. Collective."""
    failure = attempt(lambda: check_share(checkpoint, groups.rank, groups.world_size), UserError, *IO_ERRORS)
    raise_together(failure, lambda text: f"{checkpoint}: cannot be read ({text})", groups)


def _fresh_folder(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    (partial / POLICY_NAME).mkdir(parents=True)


def _save_policy(folder: Path, trainable: Trainable, groups: Groups) -> None:
    dist_checkpointing.save(_sharded_state(trainable, groups, is_loading=False), str(folder), content_metadata=METADATA)


def _sharded_state(trainable: Trainable, groups: Groups, *, is_loading: bool) -> dict:
    from megatron.core import parallel_state

    models = {f"model{index}": _model_state(chunk) for index, chunk in enumerate(trainable.chunks)}
    metadata = METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    optimizer = trainable.optimizer.sharded_state_dict(dict(models), is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": optimizer}


def _model_state(chunk) -> dict:
    """Tensors only. What Megatron saves beside them (`_extra_state`) is pickled, empty without FP8 and, for the
    stateless FP8 recipes that there are, not needed."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = chunk.sharded_state_dict(metadata=METADATA | {"dp_cp_group": group})
    return {name: value for name, value in state.items() if not name.endswith(EXTRA_STATE)}


def _load_chunks(chunks: list, state: dict) -> None:
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(state[f"model{index}"], strict=False)
        missing = [name for name in missing if not name.endswith(EXTRA_STATE)]
        assert not missing and not unexpected, f"{missing[:3]} {unexpected[:3]}: the load plan was made of this model"


def _optimizer_parts(trainable: Trainable) -> list:
    return getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])


def _init_optimizer_state(trainable: Trainable) -> None:
    """Give torch's AdamW its state before a load is planned; Apex's and Transformer Engine's know how themselves."""
    for part in _optimizer_parts(trainable):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                part.optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _fitting(state: dict, wanted: dict, saved: dict) -> dict:
    """The optimizer's loaded state in the shape that this run's optimizer has.

    Experts that are spread over ranks have an optimizer of their own: with ep > 1 there are two states {0: ..., 1: ...}
    where there is one otherwise. The moments are found by the names of the parameters either way. What is stored beside
    them is, but for the count of steps, the config's: taken from `wanted`, this run's own, where the shapes differ.
    """
    if (0 in wanted) == (0 in saved):
        return state
    then = _innermost(saved.get(0, saved))
    parts = {number: state.pop(number) for number in (0, 1)}
    parts = parts if 0 in wanted else {0: state}
    for number, part in parts.items():
        mine, now = wanted.get(number, wanted), _innermost(part)
        own = _innermost(mine)["param_groups"]
        # which parameters; nothing for a distributed optimizer
        loaded = now.get("param_groups") or [{}] * len(own)
        steps = {key: value for key, value in then["param_groups"][0].items() if key == "step"}
        now["param_groups"] = [{**group, **steps, **params} for group, params in zip(own, loaded, strict=True)]
        if "common_step" in then.get("state", {}):
            now["state"]["common_step"] = then["state"]["common_step"]
        if "param_state_sharding_type" in mine:
            part["param_state_sharding_type"] = mine["param_state_sharding_type"]
    return parts if 0 in wanted else parts[0]


def _innermost(state: dict) -> dict:
    """torch's own state of a part of Megatron's optimizer; made where nothing of it was loaded yet."""
    return state if "param_groups" in state or "state" in state else state.setdefault("optimizer", {})


def _load_optimizer(trainable: Trainable, state: dict) -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    parts = _optimizer_parts(trainable)
    torch_adam = isinstance(parts[0].optimizer, torch.optim.AdamW)
    if not (torch_adam and isinstance(parts[0], DistributedOptimizer)):
        trainable.optimizer.load_state_dict(state)
        return
    # Upstream, with torch's AdamW: DistributedOptimizer looks for `step` beside the moments of each parameter, where it
    # is not stored (KeyError), and hands one tensor to all parameters, who then all count it up. So: everything else
    # first, the moments without `step`, and a `step` of its own for each. Remove when both are mended upstream.
    for part, own in zip(parts, [state] if len(parts) == 1 else [state[i] for i in range(len(parts))], strict=True):
        moments = own.pop("param_state")
        own.pop("param_state_sharding_type")
        part.load_state_dict(own)
        steps = {parameter: values.pop("step") for parameter, values in part.optimizer.state.items()}
        with torch.no_grad():
            part.load_parameter_state_from_fully_reshardable(moments)
        for parameter, step in steps.items():
            part.optimizer.state[parameter]["step"] = step.clone()


def _save_head(path: Path, head: LogZHead) -> None:
    tensors = {f"head.{name}": value.contiguous() for name, value in head.state_dict().items()}
    save_file(tensors, path)
    give_usual_mode(path)


def _load_head(path: Path, head: LogZHead) -> None:
    """The log Z' head. Raises UserError when the file does not fit the head of this run, or was written when the head
    was moved by Adam: its hidden layers are trained there, and its rate meant something else."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if any(name.startswith("adam.") for name in tensors):
            raise UserError(
                f"{path}: holds a log Z' head of an earlier version, which Adam moved; this version moves it "
                "otherwise. Continue the run with the version that wrote it, or start anew from its export"
            )
        own = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
        head.load_state_dict(own, strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: does not hold the log Z' head of this run: {error}") from None


def _save_small_files(run: Path, partial: Path, progress: RunProgress, companions: Path) -> None:
    copy_companions(companions, partial / HF_NAME, dtype=None)
    for name in ("config.yaml", INPUTS_NAME):
        shutil.copyfile(run / name, partial / name)
    values = {"format": FORMAT, **progress.to_json()}
    (partial / PROGRESS_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _finish(run: Path, partial: Path, final: Path, shares: Sequence[dict[str, str]], keep: int | None) -> None:
    """The digests, then the name, then `latest`, then the old ones away."""
    write_sums(partial, {name: digest for share in shares for name, digest in share.items()})
    _sync_all(partial)
    old = final.with_name(final.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():  # of a run that went on from an earlier checkpoint than its last
        final.rename(old)
    partial.rename(final)
    sync(final.parent)
    write_file(final.with_name(LATEST_NAME), final.name + "\n")
    if old.exists():
        shutil.rmtree(old)
    if keep is not None:
        # those of later steps, from which the run went back, are not for this run to count or remove
        known = checkpoints_of(run)
        for earlier in known[: known.index(final) + 1][:-keep]:
            shutil.rmtree(earlier)


def _sync_all(folder: Path) -> None:
    """Have the kernel write everything out before the folder gets its name."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _stop_together(failure: BaseException | None, partial: Path, groups: Groups) -> None:
    """Where any rank has failed, a UserError on all of them, and the unfinished folder away."""
    try:
        raise_together(
            failure,
            lambda text: (
                f"{partial.with_suffix('')}: the checkpoint could not be written ({text}); earlier checkpoints are "
                "untouched; free space on that disk and start the same command again"
            ),
            groups,
        )
    except UserError:
        if groups.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
