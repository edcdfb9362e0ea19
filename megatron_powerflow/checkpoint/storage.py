"""How does a run's state, or the policy's weights alone, come back from a checkpoint? And what is a state to Megatron?

Left out: saving (`saving.py`); the digests of the files, which are compared before anything is loaded (`whole.py`); the
Hugging Face export (`hf/live_weights.py`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_powerflow.checkpoint.contents import Sums, sums_of
from megatron_powerflow.checkpoint.digests import check_share
from megatron_powerflow.checkpoint.folder import HEAD_NAME, POLICY_NAME, is_converted, tensors_folder
from megatron_powerflow.checkpoint.megatron_version import refuse_newer
from megatron_powerflow.checkpoint.moments import (
    MAIN,
    MAIN_ALONE,
    PREFIX,
    Held,
    held_moments,
    load_moments,
    moment_pieces,
)
from megatron_powerflow.checkpoint.pickle_audit import audit_checkpoint
from megatron_powerflow.checkpoint.shards import pieces_of
from megatron_powerflow.checkpoint.state import Proof, RunProgress, Trainable, read_progress, read_proof
from megatron_powerflow.errors import UserError
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, raise_together
from megatron_powerflow.whole_files import ordinary

EXTRA_STATE = re.compile(r"_extra_state\d*$")  # with a number: of an expert within a grouped product
SHARDING = "fully_reshardable"  # Megatron's word for moments that are stored like weights, whatever split wrote them
METADATA = {
    "distrib_optim_sharding_type": SHARDING,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
SETTINGS = ("betas", "eps", "weight_decay")  # of Adam's parameter groups; the rate is set at each step
RATES = ("max_lr", "min_lr")  # of the groups too: Megatron-Core 0.19 tells by them which group is which
IO_ERRORS = (OSError, RuntimeError, CheckpointException, CheckpointingException, SafetensorError)


def load(checkpoint: Path, trainable: Trainable, groups: Groups) -> RunProgress:
    """Fill `trainable` in place from a checkpoint of any layout, and compare what it holds then with what was saved.
    Collective.

    Nothing in the checkpoint is executed: pickled parts are audited first. Its files have been compared with their
    digests before (`whole.py`). Raises UserError when it cannot be loaded, or is not what was saved.
    """
    progress, proof = read_progress(checkpoint), read_proof(checkpoint)
    metadata = audit_checkpoint(checkpoint / POLICY_NAME)
    refuse_newer(checkpoint / POLICY_NAME)
    _init_optimizer_state(trainable)
    own = [{name: group[name] for name in SETTINGS if name in group} for group in trainable.optimizer.param_groups]
    sharded = sharded_state(trainable, is_loading=True)
    _as_named(sharded["optimizer"], metadata)
    with _refusing(checkpoint):
        state = dist_checkpointing.load(sharded, str(checkpoint / POLICY_NAME))
        saved = dist_checkpointing.load_common_state_dict(str(checkpoint / POLICY_NAME))
    _load_chunks(trainable.chunks, state)
    by_parameter = isinstance(_optimizer_parts(trainable)[0].optimizer, torch.optim.AdamW)
    fitting = _fitting(state["optimizer"], sharded["optimizer"], saved["optimizer"], by_parameter=by_parameter)
    _take_rates(fitting, trainable.optimizer.param_groups)
    _load_optimizer(trainable, fitting)
    moments = moments_of(trainable, to_save=False)
    with _refusing(checkpoint):
        with_main = trainable.chunks[0].config.params_dtype != torch.float32
        load_moments(checkpoint / POLICY_NAME, metadata, moments, with_main=with_main)
    for group, settings in zip(trainable.optimizer.param_groups, own, strict=True):
        group.update(settings)  # the config's, which may have changed, and not the checkpoint's
    if trainable.head is not None:
        _load_head(checkpoint / HEAD_NAME, trainable.head)
    if proof is not None:
        _compare(checkpoint, proof, loaded_proof(trainable, groups))
    return progress


def loaded_proof(trainable: Trainable, groups: Groups) -> Proof:
    """What this run's state is at the moment, in the sums of `contents.py`. Collective; the same on every rank."""
    mine = sums_of(pieces_of(sharded_state(trainable, is_loading=False)))
    mine += sums_of(moment_pieces(moments_of(trainable, to_save=True)))
    everyone: list[Sums] = [Sums()] * groups.world_size
    dist.all_gather_object(everyone, mine, group=groups.control)
    return proof_of(sum(everyone, Sums()), optimizer_step(trainable, groups))


def weights_sum(chunks: Sequence, groups: Groups) -> str:
    """What the weights are at the moment, in the sum of `contents.py`: 16 digits, alike under every layout. Collective;
    the same on every rank."""
    state = {f"model{index}": _model_state(chunk) for index, chunk in enumerate(chunks)}
    everyone: list[Sums] = [Sums()] * groups.world_size
    dist.all_gather_object(everyone, sums_of(pieces_of(state)), group=groups.control)
    return f"{sum(everyone, Sums()).weights:016x}"


def proof_of(sums: Sums, optimizer_step: int) -> Proof:
    """What is written of the sums over all ranks."""
    return Proof(
        weights=f"{sums.weights:016x}",
        masters=f"{sums.masters:016x}" if sums.num_masters else "",
        moments=f"{sums.moments:016x}",
        optimizer_step=optimizer_step,
        is_finite=sums.is_finite,
    )


def optimizer_step(trainable: Trainable, groups: Groups) -> int:
    """How many updates Adam has made. Collective: a rank without parameters takes the others' word."""
    steps = [0]
    for part in _optimizer_parts(trainable):
        held = part.optimizer.state.values() if isinstance(part.optimizer, torch.optim.AdamW) else ()
        steps += [int(values["step"]) for values in held if "step" in values]
        steps += [int(group["step"]) for group in part.optimizer.param_groups if "step" in group]
    largest = torch.tensor([max(steps)])
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.control)
    return int(largest.item())


def _compare(checkpoint: Path, saved: Proof, loaded: Proof) -> None:
    """Raises UserError with everything that is not as it was saved. Main copies are compared where both runs have
    them."""
    kinds = {"weights": "weights", "masters": "main copies of the weights", "moments": "Adam's moments"}
    wrong = []
    for name, what in kinds.items():
        then, now = getattr(saved, name), getattr(loaded, name)
        if then != now and (name != "masters" or (then and now)):
            wrong.append(f"{what} (sum {now}, saved {then})")
    if saved.optimizer_step != loaded.optimizer_step:
        wrong.append(f"Adam's step ({loaded.optimizer_step}, saved {saved.optimizer_step})")
    if wrong:
        raise UserError(
            f"{checkpoint}: what was loaded is not what was saved: {', '.join(wrong)}. Its files are those that were "
            "written, so that this is a fault of the program or of this machine's memory; start again, elsewhere if "
            "it comes back, or continue from another checkpoint (checkpoint.resume=step_N)"
        )


def load_weights(checkpoint: Path, chunks: list, groups: Groups) -> None:
    """Only the policy's weights, for scoring and generating. Collective; any layout. A converted checkpoint, which has
    no list of digests, serves too."""
    if not is_converted(checkpoint):
        _refuse_damage(checkpoint, groups)
    folder = tensors_folder(checkpoint)
    audit_checkpoint(folder)
    refuse_newer(folder)
    sharded = {f"model{index}": _model_state(chunk) for index, chunk in enumerate(chunks)}
    with _refusing(checkpoint):
        state = dist_checkpointing.load(sharded, str(folder))
    _load_chunks(chunks, state)


@contextlib.contextmanager
def _refusing(checkpoint: Path) -> Iterator[None]:
    try:
        yield
    except IO_ERRORS as error:
        raise UserError(f"{checkpoint}: cannot be loaded: {' '.join(str(error).split())[:500]}") from error


def _refuse_damage(checkpoint: Path, groups: Groups) -> None:
    """Every rank checks its share of the files; all of them refuse together. Collective."""
    failure = attempt(lambda: check_share(checkpoint, groups.rank, groups.world_size), UserError, *IO_ERRORS)
    raise_together(failure, lambda text: f"{checkpoint}: cannot be read ({text})", groups)


def sharded_state(trainable: Trainable, *, is_loading: bool) -> dict:
    """What there is to save, or to load into, as Megatron's sharded tensors; but for `moments_of`."""
    from megatron.core import parallel_state

    models = _models(trainable)
    if _distributed_parts(trainable):
        return {**models, "optimizer": _numbers(trainable, is_loading=is_loading)}
    metadata = METADATA | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    optimizer = trainable.optimizer.sharded_state_dict(dict(models), is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": optimizer}


def moments_of(trainable: Trainable, *, to_save: bool) -> Held:
    """This rank's part of the moments and main weights of a distributed optimizer; {} of another, whose moments are
    among the sharded tensors. to_save: without what another rank saves."""
    parts = _distributed_parts(trainable)
    return held_moments(parts, _models(trainable), to_save=to_save) if parts else {}


def _numbers(trainable: Trainable, *, is_loading: bool) -> dict:
    """The numbers of a distributed optimizer that are no tensors, as Megatron has them beside its sharded tensors.

    is_loading: has the optimizer make its tensors, which are to be loaded into.
    """
    parts = _optimizer_parts(trainable)
    if len(parts) > 1:
        trainable.optimizer._synchronize_steps()
    states = []
    for part in parts:
        if is_loading:
            part.load_state_dict(part.state_dict())
        states.append({**part.state_dict(), "param_state_sharding_type": SHARDING})
    return states[0] if len(states) == 1 else dict(enumerate(states))


def _models(trainable: Trainable) -> dict:
    return {f"model{index}": _model_state(chunk) for index, chunk in enumerate(trainable.chunks)}


def _model_state(chunk) -> dict:
    """Tensors only. What Megatron saves beside them (`_extra_state`) is pickled, empty without FP8 and, for the
    stateless FP8 recipes that there are, not needed."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = chunk.sharded_state_dict(metadata=METADATA | {"dp_cp_group": group})
    return {name: value for name, value in state.items() if not EXTRA_STATE.search(name)}


def _load_chunks(chunks: list, state: dict) -> None:
    for index, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(state[f"model{index}"], strict=False)
        missing = [name for name in missing if not EXTRA_STATE.search(name)]
        assert not missing and not unexpected, f"{missing[:3]} {unexpected[:3]}: the load plan was made of this model"


def _optimizer_parts(trainable: Trainable) -> list:
    return getattr(trainable.optimizer, "chained_optimizers", [trainable.optimizer])


def _distributed_parts(trainable: Trainable) -> list:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return [part for part in _optimizer_parts(trainable) if isinstance(part, DistributedOptimizer)]


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


def _fitting(state: dict, wanted: dict, saved: dict, *, by_parameter: bool) -> dict:
    """The optimizer's loaded state in the shape that this run's optimizer has.

    Experts that are spread over ranks have an optimizer of their own: with ep > 1 there are two states {0: ..., 1: ...}
    where there is one otherwise; and a distributed optimizer has other numbers beside its moments than another one. The
    moments are found by the names of the parameters either way. What is stored beside them is, but for the count of
    steps, the config's: taken from `wanted`, this run's own, where the shapes differ. by_parameter: steps are counted
    for each parameter, as torch does.
    """
    is_split, was_split = 0 in wanted, 0 in saved
    if is_split == was_split and _is_distributed(wanted) == _is_distributed(saved):
        return state
    if was_split and not is_split:
        for number in (0, 1):
            state.pop(number)
    parts = {number: state.pop(number) for number in (0, 1)} if is_split else {0: state}
    step = _step(saved)
    for number, part in parts.items():
        mine = wanted.get(number, wanted)
        if _is_distributed(mine):
            part.clear()
            part.update(mine)
            for group in part["optimizer"]["param_groups"]:
                group["step"] = step
            continue
        now = _innermost(part)
        if "optimizer" not in mine:
            part.pop("optimizer", None)
        own = _innermost(mine)["param_groups"]
        steps = {} if by_parameter else {"step": step}
        now["param_groups"] = [
            {**group, **steps, "params": loaded["params"]}
            for group, loaded in zip(own, now["param_groups"], strict=True)
        ]
        if by_parameter:
            now["state"]["common_step"] = torch.tensor(float(step))
    return parts if is_split else parts[0]


def _take_rates(state: dict, own: Sequence[dict]) -> None:
    """Give the loaded groups the rates of this run's, which may be others than the checkpoint's."""
    rates = {name: group[name] for group in own for name in RATES if name in group}
    for part in (state[number] for number in (0, 1)) if 0 in state else (state,):
        for group in _innermost(part).get("param_groups", ()):
            group.update(rates)


def _is_distributed(state: dict) -> bool:
    return "param_state_sharding_type" in state.get(0, state)


def _step(saved: dict) -> int:
    """The count of steps in what a checkpoint has beside the moments."""
    state = _innermost(dict(saved.get(0, saved)))
    counted = [group["step"] for group in state["param_groups"] if "step" in group]
    return int(state["state"]["common_step"] if "common_step" in state.get("state", {}) else counted[0])


def _as_named(optimizer: dict, metadata: Metadata) -> None:
    """Have main weights read under the name that a distributed optimizer gives them, where the checkpoint has those."""
    for shard in nested_values(optimizer):
        if isinstance(shard, ShardedTensor | ShardedTensorFactory) and shard.key not in metadata.state_dict_metadata:
            shard.key = shard.key.replace(f"{PREFIX}.{MAIN_ALONE}.", f"{PREFIX}.{MAIN}.", 1)


def _innermost(state: dict) -> dict:
    """torch's own state of a part of Megatron's optimizer; made where nothing of it was loaded yet."""
    return state if "param_groups" in state or "state" in state else state.setdefault("optimizer", {})


def _load_optimizer(trainable: Trainable, state: dict) -> None:
    """Everything of the optimizer, of a distributed one but its moments."""
    parts = _distributed_parts(trainable)
    if not parts:
        trainable.optimizer.load_state_dict(state)
        return
    for part, own in zip(parts, [state] if len(parts) == 1 else [state[i] for i in range(len(parts))], strict=True):
        own.pop("param_state_sharding_type", None)
        part.load_state_dict(own)
        if isinstance(part.optimizer, torch.optim.AdamW):  # Megatron hands all of its parameters one tensor
            for values in part.optimizer.state.values():
                values["step"] = values["step"].clone()


def _load_head(path: Path, head: LogZHead) -> None:
    """The log Z' head. Raises UserError when the file does not fit the head of this run, or was written when the head
    was moved by Adam: its hidden layers are trained there, and its rate meant something else."""
    try:
        with safe_open(ordinary(path), framework="pt") as file:
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
