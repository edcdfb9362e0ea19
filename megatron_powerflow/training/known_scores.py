"""Which micro-batches need the reference? Those whose scores are not in the store yet (`model.reference_store`).

    micro-batch --digest--> in the store? --yes--> its log-probs, bit by bit those of the pass that was made once
                                          --no---> a forward pass of the reference, whose log-probs the store keeps

A score is not a function of (base, prompt, response) alone: its last bits follow from what shares its pass, from the
layout and from the machine, since sums of other shapes are added up in another order. All of that is in the digest. So
a run with a store is bit-equal to one without, whoever has filled it; and a sweep over what comes behind the reference
(alpha, psi, learning rates) over the same rollouts under one layout makes one reference pass.

One rank of a replica reads and writes, and the others go by its word: passes are collective over the replica, and over
the replicas that share experts.

Left out: files (`reference_store/`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_powerflow.checkpoint.storage import weights_sum
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.reference import Reference
from megatron_powerflow.parallel.collectives import every_row
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import attempt, on_main, raise_together
from megatron_powerflow.records import MicroBatch, ScoredBatch, extended
from megatron_powerflow.reference_store.folder import base_digest, describe_base, prepare_store
from megatron_powerflow.reference_store.store import ReferenceStore, ScoredPass
from megatron_powerflow.training.forward_step import Scorer
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.reference_base import base_of
from megatron_powerflow.training.score import score
from megatron_powerflow.version import __version__

LIBRARIES = ("torch", "megatron-core", "transformer-engine", "triton")


@dataclass(frozen=True)
class ReferenceCount:
    """How a step's scores came about, over the run. passes: micro-batches that the reference has scored; known_share:
    of the rollouts, those whose scores were in the store; None without one."""

    passes: int
    known_share: float | None = None


@dataclass(frozen=True)
class KnownScores:
    """The store of a run. store: on the rank that speaks for its replica, None elsewhere. arithmetic: what a score's
    last bits follow from beside base and micro-batch, alike at every start of a run on like machines. stages: micro-
    batches that interleaved stages take turns of, else 1."""

    folder: Path
    store: ReferenceStore | None
    arithmetic: str
    stages: int


def open_store(plan: Plan, chunks: Sequence[PolicyModel], groups: Groups) -> KnownScores | None:
    """Open `model.reference_store`, made if it is not there; None where the config names none.

    chunks: with the base's weights. Collective over the run. Raises UserError everywhere where a rank cannot.
    """
    if plan.config.model.reference_store is None:
        return None
    folder = Path(plan.config.model.reference_store)
    about = {"weights_sum": weights_sum(chunks, groups), **base_of(plan.config, plan.architecture)}
    base = base_digest(about)
    files = {"hf_path": plan.config.model.hf_path, "weights": plan.inputs.digests.get("weights")}
    found: list[ReferenceStore] = []

    def begin() -> None:
        prepare_store(folder, plan.run_folder)
        describe_base(folder, base, {**files, **about})

    on_main(begin, groups)
    failure = None
    if groups.speaks_for_replica:
        failure = attempt(lambda: found.append(ReferenceStore(folder, base)), OSError)
    raise_together(failure, partial(_refusal, folder), groups)
    stages = plan.layout.pp if plan.layout.vpp else 1
    return KnownScores(folder, found[0] if found else None, _arithmetic(plan, groups), stages)


def score_updates(
    reference: Reference, updates: Sequence[Sequence[MicroBatch]], scorer: Scorer, known: KnownScores | None
) -> tuple[list[list[MicroBatch]], ReferenceCount]:
    """Return the micro-batches of each update with the reference's log-probs, `ScoredBatch`es on the last stage, and
    how many passes that took. Collective over the run.

    Where all of a replica's are known its reference stays where it is, in host memory or on the device. Raises
    UserError everywhere where the store cannot be written.
    """
    groups, every = scorer.groups, [batch for batches in updates for batch in batches]
    if known is None:
        passes = range(len(every))
        log_probs = _passes(reference, updates, scorer, set(passes))
        return _scored(updates, log_probs), ReferenceCount(groups.dp_size * len(passes))
    names = _names(every, known.arithmetic, groups)
    found = _found(known.store, every, names)
    table, sizes = _table_of_known(every, found, groups)
    wanted = [_to_score(row, updates, known.stages) for row in table]
    mine = wanted[groups.dp_rank]
    log_probs = _passes(reference, updates, scorer, mine)
    _keep(known, every, names, found, log_probs, groups)
    _hand_out(every, found, log_probs, groups)
    share = float((sizes * table).sum() / sizes.sum())
    return _scored(updates, log_probs), ReferenceCount(sum(map(len, wanted)), share)


def _names(batches: Sequence[MicroBatch], arithmetic: str, groups: Groups) -> list[bytes]:
    """Return the SHA-256 of what each micro-batch's scores follow from, beside the base.

    Where replicas share experts, what the others have at the same time is part of it: their tokens go through one
    product. Collective over the run in that case.
    """
    speaks = groups.speaks_for_replica  # nobody asks the others
    names = [_digest_of(batch, arithmetic) if speaks else bytes(32) for batch in batches]
    if groups.ep_size == 1:
        return names
    row = torch.from_numpy(np.frombuffer(b"".join(names), np.int64).copy())[None]
    rows = every_row(row, torch.tensor([groups.dp_rank]), groups).numpy().reshape(groups.dp_size, len(names), -1)
    own = rows[groups.dp_rank]  # the others' passes of this number have another name
    return [hashlib.sha256(own[n].tobytes() + rows[:, n].tobytes()).digest() for n in range(len(names))]


def _digest_of(batch: MicroBatch, arithmetic: str) -> bytes:
    found = hashlib.sha256(arithmetic.encode())
    tensors = [batch.tokens, batch.loss_mask]
    if batch.stream is not None:
        tensors += [batch.stream.index] + ([] if batch.stream.cu_seqlens is None else [batch.stream.cu_seqlens])
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().numpy().tobytes())
    return found.digest()


def _found(
    store: ReferenceStore | None, batches: Sequence[MicroBatch], names: Sequence[bytes]
) -> list[np.ndarray | None]:
    """Return the log-probs of the micro-batches that are known, on the rank with the store."""
    if store is None:
        return [None] * len(batches)
    store.refresh()
    counts = [int(batch.num_response_tokens.sum()) for batch in batches]
    empty = np.zeros(0, np.float32)  # of a dummy
    return [store.find(name, count) if count else empty for name, count in zip(names, counts, strict=True)]


def _table_of_known(
    batches: Sequence[MicroBatch], found: Sequence[np.ndarray | None], groups: Groups
) -> tuple[Tensor, Tensor]:
    """Return which micro-batches are known, and how many rollouts each has: [dp, number of them] int64 on every rank.

    Replicas that share experts make passes together, so that there a micro-batch is known where all of its number are.
    Collective over the run.
    """
    row = [*(int(values is not None) for values in found), *(batch.tokens.shape[0] for batch in batches)]
    rows = every_row(torch.tensor([row]), torch.tensor([groups.dp_rank]), groups)
    known, sizes = rows.split(len(batches), dim=1)
    return (known if groups.ep_size == 1 else known.min(dim=0, keepdim=True).values.expand_as(known)), sizes


def _to_score(known: Tensor, updates: Sequence[Sequence[MicroBatch]], stages: int) -> set[int]:
    """Return the numbers of a replica's micro-batches to be scored: of each update a multiple of `stages`, for which
    known ones are scored once more."""
    chosen: set[int] = set()
    first = 0
    for batches in updates:
        numbers = range(first, first + len(batches))
        unknown = [number for number in numbers if not known[number]]
        filling = [number for number in numbers if known[number]][: -len(unknown) % stages]
        chosen |= {*unknown, *filling}
        first += len(batches)
    return chosen


def _passes(
    reference: Reference, updates: Sequence[Sequence[MicroBatch]], scorer: Scorer, wanted: set[int]
) -> list[Tensor | None]:
    """Score the micro-batches of these numbers; None for all others, and on other stages than the last.

    Collective, as `run_forward` is.
    """
    log_probs: list[Tensor | None] = [None] * sum(map(len, updates))
    with reference.weights() if wanted else nullcontext() as chunks:
        first = 0
        for batches in updates:
            numbers = [first + place for place in range(len(batches)) if first + place in wanted]
            first += len(batches)
            if numbers:
                assert chunks is not None
                scored = score(chunks, [batches[n - first + len(batches)] for n in numbers], scorer)
                for number, values in zip(numbers, scored, strict=True):
                    log_probs[number] = values
    return log_probs


def _keep(
    known: KnownScores,
    batches: Sequence[MicroBatch],
    names: Sequence[bytes],
    found: Sequence[np.ndarray | None],
    log_probs: Sequence[Tensor | None],
    groups: Groups,
) -> None:
    """Put what was not known into the store. Collective over the run."""

    def write() -> None:
        assert known.store is not None
        known.store.add(
            [
                ScoredPass(name, values[batch.loss_mask].float().cpu().numpy(), len(values))
                for name, batch, before, values in zip(names, batches, found, log_probs, strict=True)
                if before is None and values is not None
            ]
        )

    failure = attempt(write, OSError) if known.store is not None else None
    raise_together(failure, partial(_refusal, known.folder), groups)


def _hand_out(
    batches: Sequence[MicroBatch],
    found: Sequence[np.ndarray | None],
    log_probs: list[Tensor | None],
    groups: Groups,
) -> None:
    """Fill in what was found, [b, s] fp32 for each micro-batch that is not scored, on all ranks of the last stage.

    Collective over the last stage of the replica.
    """
    if not groups.is_last_stage:
        return
    missing = [number for number, values in enumerate(log_probs) if values is None]
    if not missing:
        return
    rows = [torch.zeros(batches[n].tokens.shape, dtype=torch.float32, device=groups.device) for n in missing]
    if groups.speaks_for_replica:
        for number, row in zip(missing, rows, strict=True):
            values = found[number]
            assert values is not None, "neither scored nor known"
            row[batches[number].loss_mask] = torch.from_numpy(values).to(groups.device)
    flat = torch.cat([row.flatten() for row in rows])
    for group in (groups.cp, groups.tp):  # from the one rank along cp, then from that column along tp
        if dist.get_world_size(group) > 1:
            dist.broadcast(flat, src=dist.get_global_rank(group, 0), group=group)
    parts = flat.split([row.numel() for row in rows])
    for number, row, part in zip(missing, rows, parts, strict=True):
        log_probs[number] = part.view(row.shape)


def _scored(updates: Sequence[Sequence[MicroBatch]], log_probs: Sequence[Tensor | None]) -> list[list[MicroBatch]]:
    every = iter(log_probs)
    return [
        [
            batch if values is None else extended(batch, ScoredBatch, ref_log_probs=values)
            for batch, values in zip(batches, every, strict=False)
        ]
        for batches in updates
    ]


def _arithmetic(plan: Plan, groups: Groups) -> str:
    """Return what a score's bits follow from beside base and micro-batch, as JSON: layout, libraries, machine."""
    layout, parallel = plan.layout, plan.config.parallel
    return json.dumps(
        {
            "layout": {name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp", "ep")},
            "layers_per_chunk": parallel.layers_per_chunk,
            "sequence_parallel": layout.sequence_parallel,
            "deterministic": plan.config.run.deterministic,
            "versions": {"megatron_powerflow": __version__, **_versions()},
            "machine": _machine(groups.device),
        },
        sort_keys=True,
    )


def _versions() -> Mapping[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _machine(device: torch.device) -> list[str]:
    """Return what kind of machine computes: the GPU, or the processor and in how many threads."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), str(torch.version.cuda)]
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    return [processor, torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads"]


def _refusal(folder: Path, text: str) -> str:
    return (
        f"model.reference_store={str(folder)!r}: cannot be read or written ({text}); free space on that disk or mend "
        "its permissions, or leave the key out, and start again"
    )
