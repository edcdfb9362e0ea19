"""What of a rank's state is compared, and how does it come into a file? Tensors by name, one file a rank.

    log_probs/12                 [n] fp32, of rollout 12 of the first step, by the policy before any update
    gradient/NAME, weights/2/NAME    HF tensors: gradients of the first step, as they were applied; weights after step 2
    rows/0, gradient_norms/0     of step 0: [B, len(ROLLOUT_COLUMNS)] fp64; [updates] fp64; from the main rank
    drawn/12, drawn_gap/0        token ids of rollout 12 as the layout draws it; [1] nats, of replica 0
    digests.json                 of each part of the model on this rank

A rank writes what it alone has: an HF tensor comes from the tensor-parallel rank 0 of the first replica.

Left out: the comparison (`compare.py`).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed.param_and_grad_buffer import shard_buffer
from safetensors.torch import save_file
from torch import Tensor

from megatron_powerflow.checkpoint.state import Trainable
from megatron_powerflow.hf.live_weights import Placement, hf_tensors, placements
from megatron_powerflow.hf.operations import InLayers, Replicated
from megatron_powerflow.hf.shapes import is_embedding, is_output
from megatron_powerflow.records import Rollout
from megatron_powerflow.training.micro_batches import pack_updates
from megatron_powerflow.training.plan import Plan
from megatron_powerflow.training.score import score
from megatron_powerflow.training.session import Session
from megatron_powerflow.training.step import StepResult


class Seen:
    """Collects what this rank has seen of a part. Every method but `write` is collective over the run."""

    def __init__(self, plan: Plan, session: Session) -> None:
        self._plan, self._session = plan, session
        self._tensors: dict[str, Tensor] = {}

    def log_probs(self, rollouts: list[Rollout]) -> None:
        """Score the responses by the policy as it is. rollouts: this replica's share of a step."""
        for batch, values in self._scored(rollouts):
            for row, index in enumerate(batch.rollout_index.tolist()):
                self._tensors[f"log_probs/{index}"] = values[row][batch.loss_mask[row]].clone()

    def drawn(self, rollouts: list[Rollout]) -> None:
        """Compare the sampler's log-probs with the scorer's. rollouts: this replica's, drawn by the policy as it is."""
        largest = 0.0
        for batch, values in self._scored(rollouts):
            largest = max(largest, float((values - batch.rollout_log_probs).abs().max()))
        if not self._session.groups.speaks_for_replica:
            return
        self._tensors[f"drawn_gap/{self._session.groups.dp_rank}"] = torch.tensor([largest], dtype=torch.float64)
        for rollout in rollouts:
            index = rollout.slot * self._plan.config.rollout.responses_per_prompt + rollout.response_index
            self._tensors[f"drawn/{index}"] = torch.tensor(rollout.response_token_ids)

    def step(self, step: int, result: StepResult) -> None:
        """Keep what a step has given: its rows and gradient norms, and the weights behind it."""
        if self._session.groups.is_main:
            norms = [taken.grad_norm for taken in result.optimizer_steps]
            self._tensors[f"rows/{step}"] = result.rows.double()
            self._tensors[f"gradient_norms/{step}"] = torch.tensor(norms, dtype=torch.float64)
        self._hf_tensors(f"weights/{step}", lambda placement: placement.parameter.detach())

    def gradients(self) -> None:
        """Keep the gradients of the update that was made last, clipped as they were."""
        gather_gradients(self._session.trainable)
        self._hf_tensors("gradient", _gradient)

    def write(self, folder: Path) -> None:
        """Write the file of this rank, and the digests of the weights as they are now. Raises OSError."""
        rank = f"rank_{self._session.groups.rank:03d}"
        save_file({name: value.contiguous() for name, value in self._tensors.items()}, folder / f"{rank}.safetensors")
        (folder / f"{rank}.digests.json").write_text(json.dumps(self._digests()), encoding="utf-8")

    def _scored(self, rollouts: list[Rollout]):
        """Return the micro-batches with their log-probs [b, s], on the rank that speaks for its replica; [] elsewhere.

        Packed rollouts change replicas, and are scored where they are trained on.
        """
        session, scored = self._session, []
        for batches in pack_updates(rollouts, self._plan, session, 0):
            values = score(session.trainable.chunks, batches, session.scorer)
            scored += list(zip(batches, values, strict=True))
        return scored if session.groups.speaks_for_replica else []

    def _hf_tensors(self, name: str, value_of) -> None:
        plan, groups = self._plan, self._session.groups
        if groups.edp_rank == 0:
            chunks = self._session.trainable.chunks
            for hf_name, value in hf_tensors(chunks, plan.architecture, plan.family, groups, value_of=value_of):
                self._tensors[f"{name}/{hf_name}"] = value.clone()

    def _digests(self) -> dict[str, str]:
        """Return the digest of each part of the model on this rank; ranks that share a part have one name for it."""
        groups, family = self._session.groups, self._plan.family
        found = {}
        for placement in placements(self._session.trainable.chunks, family, groups.ep_rank):
            names = placement.hf_names
            if self._plan.architecture.tied_embeddings and is_output(placement.op):
                names = next(op for op in family.model_ops if is_embedding(op)).hf_names(None)
            part = "" if is_replicated(placement) else f", part {groups.tp_rank} of {groups.tp_size}"
            found[", ".join(names) + part] = _digest(placement.parameter)
        if self._session.trainable.head is not None:
            found |= {
                f"log Z' {name}": _digest(value) for name, value in self._session.trainable.head.named_parameters()
            }
        return found


def is_replicated(placement: Placement) -> bool:
    """Whether all tensor-parallel ranks hold this parameter alike."""
    op = placement.op
    return isinstance(op.op if isinstance(op, InLayers) else op, Replicated)


def gather_gradients(trainable: Trainable) -> None:
    """Complete the gradients on every rank where a distributed optimizer has left each a shard. Collective."""
    for chunk in trainable.ddp_chunks:
        for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
            if not group.ddp_config.use_distributed_optimizer:
                continue
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                shards = list(shard_buffer(bucket.grad_data, dist.get_world_size(ranks)))
                dist.all_gather(shards, shards[dist.get_rank(ranks)].clone(), group=ranks)


def _gradient(placement: Placement) -> Tensor:
    gradient = getattr(placement.parameter, "main_grad", None)
    return torch.zeros_like(placement.parameter) if gradient is None else gradient  # of a buffer, which nothing moves


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()[:16]
