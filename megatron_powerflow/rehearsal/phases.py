"""What does each phase of a step take on one rank? The run's own modules and schedules, without numbers.

    weights -> reference -> gradients, optimizer -> prefill -> decoding -> scoring -> update -> optimizer step

Left out: what is decided by numbers, such as which tokens are response tokens: here every rollout is as long as it may
be. The loss is the square of the summed log-probs: the objective's own terms are a few numbers per rollout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_powerflow.log_probs.token_log_probs import MAX_LOGITS, MAX_LOGITS_CPU
from megatron_powerflow.model.build import build_chunks, transformer_config
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import needs_own_layers
from megatron_powerflow.model.stream import extent
from megatron_powerflow.objective.presets import LEARNED_LOG_Z
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import MicroBatch
from megatron_powerflow.rehearsal.batches import micro_batches
from megatron_powerflow.rehearsal.decoding import Decoding
from megatron_powerflow.rehearsal.fake_world import DEVICE, fake_world, group_names
from megatron_powerflow.rehearsal.job import Job, RankKind
from megatron_powerflow.rehearsal.live_bytes import LiveBytes
from megatron_powerflow.rehearsal.memory import RankMemory
from megatron_powerflow.rehearsal.scorer import CountingScorer, PlainKernel
from megatron_powerflow.rehearsal.stand_ins import FusedAttention, stand_in_for_transformer_engine
from megatron_powerflow.training.forward_step import run_forward, run_forward_backward
from megatron_powerflow.training.optimizer import build_trainable

SCORED = 2  # micro-batches of the scoring phase: one after the other, so that more need no more memory


def rehearse_rank(job: Job, kind: RankKind) -> RankMemory:
    """Return what a kind of rank needs. One at a time in a process; after `prepare`.

    The optimizer's moments are there from the beginning, as they are in every step of a run but the first.
    """
    with fake_world(job.layout, kind.rank) as groups, FusedAttention():
        recorder = LiveBytes(DEVICE.type, group_names(groups))
        with recorder:
            return _Rank(job, kind, groups, recorder).rehearse()


class _Rank:
    """One rank of the run, and what it has built so far."""

    def __init__(self, job: Job, kind: RankKind, groups: Groups, recorder: LiveBytes) -> None:
        self.job, self.kind, self.groups, self.recorder = job, kind, groups, recorder
        self.config, self.layout, self.architecture = job.config, job.layout, job.architecture
        on_te = job.on == "cuda" and self.config.precision.dtype != "fp32"
        self.with_te = on_te and not needs_own_layers(self.architecture, self.layout.cp)
        rollout = self.config.rollout
        self.scorer = CountingScorer(
            groups,
            self.architecture.vocab_size,
            rollout.temperature,
            self.layout.sequence_parallel,
            PlainKernel(MAX_LOGITS if job.on == "cuda" else MAX_LOGITS_CPU),
            num_prompt_tokens=rollout.max_prompt_tokens,
            num_response_tokens=rollout.max_response_tokens,
        )

    def rehearse(self) -> RankMemory:
        phase = self.recorder.phase
        with phase("weights"):
            chunks = self._chunks()
        reference = chunks
        with phase("reference"):
            if self.config.model.reference == "resident":
                reference = self._chunks()
            elif self.job.on == "cpu":  # there the host's copies, of the base and of the policy, are of the same memory
                self._swapped = [torch.empty_like(p) for chunk in chunks for p in (*chunk.parameters(),) * 2]
        with phase("gradients, optimizer"):
            trainable = build_trainable(chunks, self._head(), self.config, self.groups)
            self._step(trainable)
        self._rollout(chunks)
        with phase("micro-batches"):
            batches = micro_batches(self.job, self.groups)
        with phase("reference scores"), torch.no_grad():
            run_forward(reference, batches[:SCORED], self.scorer, self.scorer.log_probs)
        with phase("update"):
            trainable.zero_grad()
            self._update(trainable, batches)
        with phase("optimizer step"):
            self._step(trainable)
        buffers = [b for ddp in trainable.ddp_chunks for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        return RankMemory(
            name=self.kind.name,
            count=self.kind.count,
            phases=tuple(self.recorder.phases),
            gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
            log_prob_kernel=self._log_prob_kernel(chunks[-1], batches[0]),
            fp8_copies=self._fp8_copies(chunks),
        )

    def _chunks(self) -> list[PolicyModel]:
        config = transformer_config(self.architecture, self.layout, self.config.model, self.config.precision)
        # Stages tell each other no shapes here, for a message has no content; all micro-batches are alike instead.
        config.variable_seq_lengths = config.batch_p2p_comm = False
        if self.architecture.experts:  # which expert a token goes to is decided by numbers: here each takes as many
            config.moe_pad_expert_input_to_capacity, config.moe_expert_capacity_factor = True, 1.0
        config.bias_activation_fusion = self.with_te and self.architecture.activation == "silu"
        with DEVICE:
            chunks = build_chunks(config, self.architecture, self.layout, self.config.precision, DEVICE)
        if self.with_te:
            stand_in_for_transformer_engine(chunks)
        return chunks

    def _head(self) -> LogZHead | None:
        objective = self.config.objective
        if objective.log_z not in LEARNED_LOG_Z or not self.groups.is_last_stage:
            return None
        head = LogZHead(self.architecture.hidden_size, kind=objective.log_z, detach=True, seed=0)
        return head.to(DEVICE)

    def _step(self, trainable) -> None:
        trainable.optimizer.prepare_grads()
        trainable.optimizer.step_with_ready_grads()

    def _rollout(self, chunks: Sequence[PolicyModel]) -> None:
        """Prefill as many prompts as a pass takes, and make the last pass of the longest responses."""
        with self.recorder.phase("KV cache"):
            decoding = Decoding(self.job, self.groups, chunks)
        with self.recorder.phase("prefill"), torch.no_grad():
            decoding.prefill()
        with self.recorder.phase("decoding"), torch.no_grad():
            decoding.decode()

    def _log_prob_kernel(self, chunk: PolicyModel, batch: MicroBatch) -> int:
        """Return the most bytes that log-probs of a micro-batch and their gradients take; 0 but on the last stage."""
        if not self.groups.is_last_stage:
            return 0
        positions, rows = extent(batch)
        shape = (positions // self.groups.cp_size, rows, self.architecture.hidden_size)
        hidden = torch.empty(shape, dtype=chunk.config.params_dtype, device=DEVICE, requires_grad=True)
        with self.recorder.phase("log-probs"):
            self.scorer.log_probs(hidden, chunk, batch).sum().backward()
        phase = self.recorder.phases.pop()
        return phase.peak - phase.before

    def _fp8_copies(self, chunks: Sequence[PolicyModel]) -> int:
        """Return the bytes of the FP8 weights that Transformer Engine keeps, computed.

        Of the policy two a weight, row-wise and transposed; of a resident reference one, for it has no backward pass.
        """
        if self.config.precision.dtype != "fp8":
            return 0
        matrices = (ColumnParallelLinear, RowParallelLinear)
        layers = [m for chunk in chunks for m in chunk.decoder.modules() if isinstance(m, matrices)]
        return sum(m.weight.numel() for m in layers) * (3 if self.config.model.reference == "resident" else 2)

    def _update(self, trainable, batches: Sequence[MicroBatch]) -> None:
        head = trainable.head

        def loss_and_rows(hidden: Tensor, chunk: PolicyModel, batch: MicroBatch):
            residuals = self.scorer.log_probs(hidden, chunk, batch).sum(dim=1)
            if head is not None:
                residuals = residuals + head(self.scorer.prompt_pool(hidden, batch))
            return residuals.square().sum(), residuals.detach()

        run_forward_backward(trainable.ddp_chunks, batches, self.scorer, loss_and_rows)
