"""How does the live policy write responses? KV-cached decoding in the training processes themselves.

A prompt is prefilled once for all its responses. Each pipeline stage runs its part of a token and hands the hidden
states on; the last stage samples and tells the other stages the tokens. Groups wait until there are rows for them, and
take those of finished responses (`decode_batch.py`). With pp > 1 the rows are split into decode batches that follow
each other through the stages, so that none waits idle:

    stage 0   batch 0 t0 | batch 1 t0 | batch 0 t1 | batch 1 t1 | ...
    stage 1              | batch 0 t0 | batch 1 t0 | batch 0 t1 | ...

Left out:

- Engines in other processes, and CUDA graphs. On a GPU a small batch waits for kernel launches, some dozen a layer,
  which a graph of one decoding pass would save: shapes change only when rows join or leave and when attention grows
  past `max_length`, so one graph per (rows, max_length) would do.
- Megatron's dynamic engine, which has such graphs (megatron/core/inference of 0.16.1 and 0.19.2). It cannot serve a
  CPU: megatron/core/transformer/attention.py asserts flash-attn 2.7.3, and contexts/dynamic_context.py makes its state
  of CUDA tensors. Nor every layout on a GPU: that context takes a stage for one chunk (vp_stage=None). One
  `sampling_rng` draws for all requests, so that samples depend on who shares the batch; ours are a function of (seed,
  step, slot, response). 0.16.1 takes log-probs of the logits without the temperature (0.19.2 can apply it), logits are
  gathered over tp and broadcast over the pipeline, and a request has one `termination_id` where a model may have
  several stop tokens.
- Drafts. Tokens of the prompt as a draft would be exact, for a row's uniform numbers draw the same tokens whatever was
  guessed. But a pass over k guesses computes k + 1 tokens a row, and products of 64 rows already run at 96 per cent of
  their rate at 128: on a CPU even guesses that are all right only break even. An earlier response of the same prompt
  would be exact if the first refused token were drawn from max(p - p_old, 0), which needs the old distribution over the
  whole vocabulary; one number a token is kept.
- One copy of a prompt's keys for the attention of all its responses; each row has its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_powerflow.log_probs.plain import make_logits
from megatron_powerflow.model.decode_weights import decode_weights
from megatron_powerflow.model.length_step import length_step as step_of_device
from megatron_powerflow.parallel.groups import Groups
from megatron_powerflow.parallel.together import anyone, largest
from megatron_powerflow.records import Prompt, Rollout, SamplingParams
from megatron_powerflow.rollout.decode_batch import PREFILL_TOKENS, DecodeBatch
from megatron_powerflow.rollout.engine import ProgressCallback
from megatron_powerflow.rollout.sampling import sample_tokens

if TYPE_CHECKING:
    from megatron_powerflow.model.policy_model import PolicyModel


class MegatronEngine:
    """An engine that decodes with the policy's own chunks: no copy of the weights, nothing to synchronise.

    vocab_size: the tokens that may be drawn, without the padding of the output layer. max_concurrent_rows: responses
    decoded at a time on a data-parallel rank (bounds the KV cache). alignment: tokens of a forward pass are padded to a
    multiple of this (tp with sequence parallelism, FP8). length_step: the steps in which the lengths grow that
    attention sees; None: those of the device. prefill_tokens: the most tokens of prompts in a pass, but for a longer
    prompt.
    """

    def __init__(
        self,
        chunks: Sequence[PolicyModel],
        groups: Groups,
        *,
        vocab_size: int,
        max_concurrent_rows: int,
        alignment: int,
        length_step: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        self._chunks, self._groups, self._vocab_size = list(chunks), groups, vocab_size
        self._max_rows, self._alignment = max_concurrent_rows, alignment
        self._length_step = step_of_device(groups.device) if length_step is None else length_step
        self._prefill_tokens = prefill_tokens
        self._config = chunks[0].config
        self._sends: deque[tuple[dist.Work, Tensor]] = deque()

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams, progress: ProgressCallback | None = None
    ) -> list[Rollout]:
        """Draw responses, as `Engine.generate` says."""
        training = [chunk.training for chunk in self._chunks]
        for chunk in self._chunks:
            chunk.eval()
            chunk.set_is_first_microbatch()  # Transformer Engine: FP8 copies of the weights are made anew, then kept
        batches = self._decode_batches(prompts, sampling)
        total = len(prompts) * sampling.responses_per_prompt
        with decode_weights(self._chunks, sampling.max_response_tokens):
            self._run(batches, sampling, total, progress)
        for chunk, was_training in zip(self._chunks, training, strict=True):
            chunk.train(was_training)
        order = {slot: index for index, (slot, _) in enumerate(prompts)}
        rollouts = [rollout for batch in batches for rollout in batch.rollouts]
        return sorted(rollouts, key=lambda rollout: (order[rollout.slot], rollout.response_index))

    def begin(self, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams) -> None:
        """Do nothing: the live weights sample or train, one at a time."""

    def new_weights(self, step: int) -> None:
        """Do nothing: it samples with the weights themselves."""

    def rest(self) -> None:
        """Do nothing: its cache goes with each `generate`."""

    def metrics(self) -> dict[str, float]:
        """Return nothing beside what rollouts say themselves."""
        return {}

    def show_life(self, beat: Callable[[], None], stop_asked: Callable[[], bool]) -> None:
        """Do nothing: each pass through the model shows it."""

    def close(self) -> None:
        """Do nothing."""

    def _decode_batches(self, prompts: Sequence[tuple[int, Prompt]], sampling: SamplingParams) -> list[DecodeBatch]:
        """Make up to pp decode batches, which share evenly the groups that may have rows at a time.

        They are as many as on any rank that shares experts with this one, if need be without a group.
        """
        waiting = deque(prompts)
        at_a_time = min(len(prompts), max(1, self._max_rows // sampling.responses_per_prompt))
        num_batches = largest(min(self._groups.pp_size, at_a_time), self._groups)
        longest = max((len(prompt.token_ids) for _, prompt in prompts), default=0)
        tp_size, device = self._groups.tp_size, self._groups.device
        return [
            DecodeBatch(
                waiting,
                at_a_time * (index + 1) // num_batches - at_a_time * index // num_batches,
                longest,
                sampling,
                self._chunks,
                tp_size,
                device,
                length_step=self._length_step,
                prefill_tokens=self._prefill_tokens,
            )
            for index in range(num_batches)
        ]

    def _run(
        self, batches: list[DecodeBatch], sampling: SamplingParams, total: int, progress: ProgressCallback | None
    ) -> None:
        """Decode the batches to their ends, one token of one batch after the other."""
        running = deque(batches)
        while running:
            batch = running.popleft()
            batch.take_tokens()  # of the previous round, from the last stage
            if progress is not None and (batch is batches[0] or batch.finished):
                progress(sum(len(batch.rollouts) for batch in batches), total)
            if not anyone(not batch.finished, self._groups):
                continue
            if batch.finished:
                self._idle_pass()
            else:
                hidden = self._forward(batch)
                batch.exchange(self._sample(batch, hidden, sampling), self._groups)
            running.append(batch)
        while self._sends:
            self._sends.popleft()[0].wait()

    def _forward(self, batch: DecodeBatch) -> Tensor | None:
        """Run the batch's coming tokens through this rank's chunks; hidden states on the last stage, None elsewhere."""
        coming = batch.coming_tokens()
        padding = -len(coming) % self._alignment  # repeats of the last token: computed, stored nowhere, ignored
        tokens = torch.from_numpy(np.pad(coming, (0, padding), mode="edge")).to(self._groups.device)
        hidden = None
        for chunk_index, chunk in enumerate(self._chunks):
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(len(tokens)))
            with batch.entering(chunk_index, chunk, padding):
                hidden = chunk(tokens[None], None, None)
            if not chunk.post_process:
                self._send(hidden)
                hidden = None
        return hidden

    def _idle_pass(self) -> None:
        """Make a pass over padding alone, for the ranks that share experts with this one: see `together.anyone`."""
        tokens = torch.zeros(1, self._alignment, dtype=torch.int64, device=self._groups.device)
        for chunk in self._chunks:
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(self._alignment))
            hidden = chunk(tokens, None, None)
            if not chunk.post_process:
                self._send(hidden)

    def _sample(
        self, batch: DecodeBatch, hidden: Tensor | None, sampling: SamplingParams
    ) -> tuple[Tensor, Tensor] | None:
        """Sample the batch's tokens on the last stage: (tokens [rows] int64, log-probs [rows] fp32); None elsewhere."""
        if hidden is None:
            return None
        if self._config.sequence_parallel:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            hidden = gather_from_sequence_parallel_region(hidden, group=self._groups.tp)
        weight = self._chunks[-1].output_weight()
        first = self._groups.tp_rank * weight.shape[0]
        softcap = self._chunks[-1].logit_softcap
        # at temperature 0 the most likely token is the same at any other
        logits = make_logits(batch.predicting(hidden), weight, sampling.temperature or 1.0, softcap, torch.float32)
        if first + weight.shape[0] > self._vocab_size:
            logits[:, max(self._vocab_size - first, 0) :] = -torch.inf
        if batch.draws_each > 1:
            logits = logits.repeat_interleave(batch.draws_each, dim=0)
        return sample_tokens(logits, batch.uniform(), tp_group=self._groups.tp, first=first)

    def _neighbour(self, step: int) -> int:
        return dist.get_global_rank(self._groups.pp, (self._groups.pp_rank + step) % self._groups.pp_size)

    def _send(self, hidden: Tensor) -> None:
        hidden = hidden.contiguous()
        work = dist.isend(hidden, self._neighbour(+1), group=self._groups.pp)
        assert work is not None, "None is for ranks that are not of the group"
        self._sends.append((work, hidden))
        while len(self._sends) > 2 * self._groups.pp_size:  # keeps the buffers of finished sends from piling up
            self._sends.popleft()[0].wait()

    def _receive(self, num_tokens: int) -> Tensor:
        if self._config.sequence_parallel:
            num_tokens //= self._groups.tp_size
        shape = (num_tokens, 1, self._config.hidden_size)
        hidden = torch.empty(shape, dtype=self._config.pipeline_dtype, device=self._groups.device)
        dist.recv(hidden, self._neighbour(-1), group=self._groups.pp)
        return hidden
