"""What does each phase of a step take on one rank? The run's own modules and schedules, without numbers.

    weights -> load -> reference -> gradients, optimizer -> prefill -> decoding -> scoring -> update -> optimizer step
    -> save -> export

No rank decodes where vLLM servers draw the responses.

Left out: what is decided by numbers: every rollout is as long as it may be. The loss is the square of the summed
log-probs: the objective's own terms are a few numbers per rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_powerflow.checkpoint.storage import moments_of, sharded_state
from megatron_powerflow.hf.families import FAMILIES
from megatron_powerflow.hf.live_weights import hf_tensors, load_from_hf
from megatron_powerflow.hf.shapes import expected_tensors
from megatron_powerflow.log_probs.kernel_choice import LogProbKernel
from megatron_powerflow.log_probs.token_log_probs import MAX_LOGITS, MAX_LOGITS_CPU, token_log_probs
from megatron_powerflow.model.build import build_chunks, transformer_config
from megatron_powerflow.model.log_z_head import LogZHead
from megatron_powerflow.model.policy_model import PolicyModel
from megatron_powerflow.model.precision import needs_own_layers
from megatron_powerflow.model.stream import extent
from megatron_powerflow.objective.presets import LEARNED_LOG_Z
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.records import MicroBatch
from megatron_powerflow.rehearsal.batches import micro_batches, scored_micro_batches
from megatron_powerflow.rehearsal.decoding import Decoding
from megatron_powerflow.rehearsal.fake_world import DEVICE, fake_world, group_names
from megatron_powerflow.rehearsal.job import Job, RankKind
from megatron_powerflow.rehearsal.live_bytes import LiveBytes
from megatron_powerflow.rehearsal.memory import RankMemory
from megatron_powerflow.rehearsal.stand_ins import FusedAttention, stand_in_for_transformer_engine
from megatron_powerflow.training.forward_step import Scorer, run_forward, run_forward_backward
from megatron_powerflow.training.optimizer import build_trainable


def rehearse_rank(job: Job, kind: RankKind) -> RankMemory:
    """Return what a kind of rank needs. One at a time in a process; after `prepare`.

    The optimizer's moments are there from the beginning, as they are in every step of a run but the first.
    """
    with fake_world(job.layout, kind.rank) as groups, FusedAttention():
        recorder = LiveBytes(DEVICE.type, group_names(groups))
        with recorder:
            return _Rank(job, kind, groups, recorder).rehearse()


class _PlainKernel(LogProbKernel):
    """The plain arithmetic, with so many logits at a time as it has on the device that is rehearsed for.

    Triton's holds fewer bytes: its tiles stay in registers.
    """

    def __init__(self, max_logits: int) -> None:
        super().__init__(lambda hidden: None)
        self._max_logits = max_logits

    def log_probs(self, hidden: Tensor, output_weight: Tensor, targets: Tensor, **arguments) -> Tensor:
        return token_log_probs(hidden, output_weight, targets, max_logits=self._max_logits, **arguments)


class _Weights:
    """A Hugging Face folder without numbers: a `TensorSource` of the shapes that a model's tensors have."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self._shapes, self._dtype = shapes, dtype

    def read(self, name: str, *, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> Tensor:
        shape = list(self._shapes[name])
        for axis, part in enumerate((rows, columns)):
            if part is not None:
                shape[axis] = part[1] - part[0]
        return torch.empty(shape, dtype=self._dtype, device=DEVICE)


class _Rank:
    """One rank of the run, and what it has built so far."""

    def __init__(self, job: Job, kind: RankKind, groups: Groups, recorder: LiveBytes) -> None:
        self.job, self.kind, self.groups, self.recorder = job, kind, groups, recorder
        self.config, self.layout, self.architecture = job.config, job.layout, job.architecture
        self.family = FAMILIES[job.architecture.family]
        on_te = job.on == "cuda" and self.config.precision.dtype != "fp32"
        self.with_te = on_te and not needs_own_layers(self.architecture, self.layout.cp)
        self.scorer = Scorer(
            groups,
            self.architecture.vocab_size,
            self.config.rollout.temperature,
            self.layout.sequence_parallel,
            _PlainKernel(MAX_LOGITS if job.on == "cuda" else MAX_LOGITS_CPU),
        )

    def rehearse(self) -> RankMemory:
        phase = self.recorder.phase
        with phase("weights"):
            chunks = self._chunks()
        loading = self._loading(chunks)
        reference = chunks
        with phase("reference"):
            if self.config.model.reference == "resident":
                reference = self._chunks()
            elif self.job.on == "cpu":  # there the host's copies, of the base and of the policy, are of the same memory
                self._swapped = [torch.empty_like(p) for chunk in chunks for p in (*chunk.parameters(),) * 2]
        with phase("gradients, optimizer"):
            trainable = build_trainable(chunks, self._head(), self.config, self.groups)
            self._step(trainable)
        if not self.job.is_served:
            self._rollout(chunks)
        with phase("micro-batches"):
            batches = micro_batches(self.job, self.groups)
        with phase("reference scores"), torch.no_grad():
            run_forward(reference, batches[: scored_micro_batches(self.job)], self.scorer, self.scorer.log_probs)
        with phase("update"):
            trainable.zero_grad()
            self._update(trainable, batches)
        with phase("optimizer step"):
            self._step(trainable)
        with phase("save"):  # what goes to the host is copied from where it is
            apply_factories(sharded_state(trainable, is_loading=False))
            moments_of(trainable, to_save=True)
        with phase("export"):
            for _ in hf_tensors(chunks, self.architecture, self.family, self.groups):
                pass
        buffers = [b for ddp in trainable.ddp_chunks for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        return RankMemory(
            name=self.kind.name,
            count=self.kind.count,
            phases=tuple(self.recorder.phases),
            gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
            log_prob_kernel=self._log_prob_kernel(chunks[-1], batches[0]),
            fp8_copies=self._fp8_copies(chunks),
            loading=loading,
        )

    def _loading(self, chunks: Sequence[PolicyModel]) -> int:
        """Return the most bytes that are read at a time, into host memory."""
        source = _Weights(expected_tensors(self.architecture, self.family), chunks[0].config.params_dtype)
        with self.recorder.phase("load"):
            load_from_hf(chunks, source, self.architecture, self.family, self.groups)
        phase = self.recorder.phases.pop()
        return phase.peak - phase.before

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
